"""The loop around encoders that are tuned in part, and around VLMo with all its losses."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from features.catalogue import Catalogue
from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.finetuning.checkpoints import FILE_NAME
from features.finetuning.loop import FinetuningResult, finetune
from tests.features.small_encoder import small_catalogue
from tests.features.test_finetuning import KilledError, config, killed_after, pairs_of
from tests.features.test_finetuning_objectives import ALL, vlmo

pytestmark = pytest.mark.usefixtures("one_thread")

N_ITEMS = 30


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return small_catalogue(tmp_path_factory.mktemp("pictures"), N_ITEMS)


def tune(encoder: Encoder, catalogue: Catalogue, **more: Any) -> tuple[dict[str, Tensor], FinetuningResult]:
    progress, folder = more.pop("progress", None), more.pop("folder", None)
    result = finetune(
        encoder,
        catalogue,
        config(epochs=2, checkpoint_steps=1, **more),
        rng=np.random.default_rng(0),
        co_purchases=pairs_of(N_ITEMS),
        checkpoint_folder=folder,
        progress=progress,
    )
    return encoder.state_dict(), result


@pytest.mark.parametrize(
    "tuning",
    [
        {"mode": "last-n", "last_n": 1},
        {"mode": "lora", "lora_rank": 2, "lora_dropout": 0.3},
        {"mode": "full", "gradient_checkpointing": True},
        {"mode": "full", "frozen_towers": ["image"]},
    ],
)
def test_a_partly_tuned_encoder_is_resumed_exactly(
    catalogue: Catalogue, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    optimizer = {"learning_rate": 5e-3, "layer_decay": 0.8, "head_factor": 2.0}
    whole, result = tune(load_encoder("tiny"), catalogue, tuning=tuning, optimizer=optimizer)
    with pytest.raises(KilledError):
        tune(
            load_encoder("tiny"),
            catalogue,
            tuning=tuning,
            optimizer=optimizer,
            folder=tmp_path,
            progress=killed_after(2),
        )
    again, resumed = tune(
        load_encoder("tiny"), catalogue, tuning=tuning, optimizer=optimizer, folder=tmp_path
    )
    assert resumed.resumed_after == 2
    assert list(again) == list(load_encoder("tiny").state_dict())  # plain again
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    drop = "seconds"
    assert resumed.history_frame().drop(drop).equals(result.history_frame().drop(drop))


def test_chunks_leave_a_network_with_batch_normalisation_as_whole_batches_do(catalogue: Catalogue) -> None:
    """`tiny` normalises over batches; its learnt statistics stay, or chunks would see each other."""
    before = load_encoder("tiny").state_dict()
    (whole, _), (chunked, _) = (
        tune(load_encoder("tiny"), catalogue, chunk_size=size, held_out_share=0.3, patience=0)
        for size in (64, 4)
    )
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(chunked[name], before[name]) for name in statistics)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, atol=2e-3, rtol=1e-2)


def test_vlmo_learns_by_all_its_losses(catalogue: Catalogue, tmp_path: Path) -> None:
    encoder = vlmo(tmp_path)
    words = np.random.default_rng(0).choice(["red", "bag", "blue", "shoes", "warm", "10"], (N_ITEMS, 4))
    titles = pl.Series("title", [" ".join(row) for row in words])
    catalogue = Catalogue(catalogue.items.with_columns(titles), catalogue.image_root)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    objectives = {**ALL, "masked_share": 0.4, "pairs": {"of": "fused"}}
    optimizer = {"learning_rate": 3e-3}
    state = tmp_path / "state"
    _, result = tune(encoder, catalogue, objectives=objectives, optimizer=optimizer, folder=state)
    assert set(ALL) <= {name.removeprefix("loss_") for name in result.history[2]}
    for name in ALL:
        assert result.history[2][f"gradient_norm_{name}"] > 0
    assert result.history[2]["loss"] < result.history[1]["loss"]
    total = sum(weight * result.history[2][f"loss_{name}"] for name, weight in ALL.items())
    assert result.history[2]["loss"] == pytest.approx(total, rel=1e-4)
    last = load_file(state / FILE_NAME)  # whichever epoch was the best
    for head in ("itm_score", "mlm_score", "pooler", "itc_vl_text_proj"):
        name = next(each for each in before if head in each and each.endswith("weight"))
        assert not torch.equal(before[name], last[f"model/{name}"]), head
