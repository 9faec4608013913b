"""One joint step moves an encoder where its mode says, and nowhere else; its gradient is autograd's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from features.catalogue import Catalogue, TextConfig
from features.encoders.base import Encoder
from features.images import ImageLimits
from features.live.building import LiveConfig, live_encoder
from features.live.inputs import RowInputs
from features.tuning.modes import TuningConfig, prepare_tuning
from features.tuning.towers import towers_of
from recommenders.feature_input import FeatureTable
from recommenders.live import LiveTable
from recommenders.models.base import Recommender
from recommenders.models.registry import build_model
from recommenders.sampling import Batch
from tests.features.small_catalogue import picture_catalogue
from tests.features.test_tuning_towers import ENCODERS
from tests.worlds import random_world

N_ITEMS, N_USERS = 8, 6
RECOMMENDERS = {
    "vbpr": {"dim": 4},
    "freedom": {"dim": 4, "k": 3, "feature_weight": 1.0},
    "lattice": {"dim": 4, "k": 3},
}
TRAIN = random_world(n_users=N_USERS, n_items=N_ITEMS, density=0.4).split.train
# Every item is in the batch, as LATTICE's graph reads all of them.
BATCH = Batch(torch.arange(N_ITEMS) % N_USERS, torch.arange(N_ITEMS), torch.arange(N_ITEMS).roll(3)[:, None])
MODES = {
    "full": TuningConfig(mode="full"),
    "last-n": TuningConfig(mode="last-n", last_n=1),
    "lora": TuningConfig(mode="lora", lora_rank=2),
    "locked image": TuningConfig(mode="full", frozen_towers=("image",)),
}


@pytest.fixture(name="catalogue", scope="module")
def _catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return picture_catalogue(tmp_path_factory.mktemp("pictures"), N_ITEMS)


def unit(_: str, vectors: Tensor) -> Tensor:
    return normalize(vectors, dim=1)


def encoder_of(name: str, folder: Path) -> Encoder:
    folder.mkdir()
    return ENCODERS[name](folder)


def in_type(dtype: torch.dtype, encoder: Encoder) -> Encoder:
    """The encoder computing in a type; its pictures come as float32."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, pixels: (pixels[0].to(dtype),))
    return encoder.to(dtype)


def whole_catalogue(encoder: Encoder, catalogue: Catalogue, folder: Path) -> FeatureTable:
    """The naive way: every item through the whole encoder at once, with its graph."""
    vectors = {}
    for modality in ("image", "text"):
        inputs = RowInputs(
            catalogue,
            encoder,
            modality,  # type: ignore[arg-type]  # a literal in a loop
            TextConfig(),
            cache_file=folder / f"{modality}.f16",
            cache_mb=1,
            limits=ImageLimits(),
        )
        encode = encoder.encode_images if modality == "image" else encoder.encode_texts
        vectors[modality] = unit(modality, encode(inputs(torch.arange(N_ITEMS), torch.device("cpu"))))
        inputs.close()
    return FeatureTable(vectors, {name: torch.ones(N_ITEMS, dtype=torch.bool) for name in vectors})


def frozen(table: FeatureTable) -> FeatureTable:
    return FeatureTable({name: value.detach() for name, value in table.vectors.items()}, table.present)


def model_of(name: str, table: FeatureTable) -> Recommender:
    model = build_model(name, RECOMMENDERS[name], TRAIN, table, np.random.default_rng(0)).train()
    with torch.no_grad():  # as after some training; gradients of the first embeddings are nearly nothing
        for parameter in model.parameters():
            parameter.mul_(4)
    torch.manual_seed(0)  # FREEDOM draws the edges of an epoch
    model.start_epoch(table)
    return model


@pytest.mark.parametrize("recommender", list(RECOMMENDERS))
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["clip", "vlmo"])
def test_a_joint_step_moves_exactly_what_the_mode_trains(
    name: str, mode: str, recommender: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    encoder = encoder_of(name, tmp_path / "encoder")
    tuned = prepare_tuning(encoder, MODES[mode])
    with torch.no_grad():
        start = frozen(whole_catalogue(encoder, catalogue, tmp_path))
    model = model_of(recommender, start)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    # Low-rank updates start at zero: of their first step only the second factor can move.
    with live_encoder(
        tuned, catalogue, ("image", "text"), start.present, LiveConfig(chunk=3), folder=tmp_path / "live"
    ) as rows:
        # Adam's first step is the sign of the gradient, so that small ones move large weights, too.
        optimizer = torch.optim.Adam(list(rows.parameters()), lr=0.1, eps=1e-30)
        LiveTable(start, rows, unit).step(torch.arange(N_ITEMS), lambda table, _: model.loss(BATCH, table))
        reached = {key for key, value in rows.named_parameters().items() if value.grad is not None}
        nonzero = {
            key
            for key, value in rows.named_parameters().items()
            if value.grad is not None and value.grad.any()
        }
        optimizer.step()
    moved = {key for key, value in encoder.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == nonzero
    assert moved <= set(tuned.trainable)
    # Nothing is left out, but what no vector depends on: temperatures, and VLMo's other experts and heads.
    used = {key for tower in towers_of(encoder).values() for key in tower.parameters()}
    missed = (set(tuned.trainable) & used) - reached
    assert not missed
    if mode == "lora":
        assert {key for key in moved if ".lora_B" in key} == {key for key in reached if ".lora_B" in key}
    elif mode == "last-n":
        first = towers_of(encoder)["image"].block_parameters(0)
        assert not moved & (set(first) - set(towers_of(encoder)["image"].block_parameters(1)))
    elif mode == "locked image":
        assert not moved & set(towers_of(encoder)["image"].parameters())
        assert moved & set(towers_of(encoder)["text"].parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("recommender", list(RECOMMENDERS))
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["clip", "vlmo"])
def test_gradients_equal_a_naive_run_through_the_whole_catalogue(
    name: str, mode: str, recommender: str, dtype: torch.dtype, catalogue: Catalogue, tmp_path: Path
) -> None:
    encoder = in_type(dtype, encoder_of(name, tmp_path / "encoder"))
    tuned = prepare_tuning(encoder, MODES[mode])
    whole = whole_catalogue(encoder, catalogue, tmp_path)
    model = model_of(recommender, frozen(whole))
    parameters = {**tuned.trainable, **{f"recommender {key}": p for key, p in model.named_parameters()}}
    model.loss(BATCH, whole).backward()
    expected = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
    assert set(tuned.trainable) & set(expected)
    for parameter in parameters.values():
        parameter.grad = None
    with live_encoder(
        tuned, catalogue, ("image", "text"), whole.present, LiveConfig(chunk=3), folder=tmp_path / "live"
    ) as rows:
        LiveTable(frozen(whole), rows, unit).step(
            torch.arange(N_ITEMS), lambda table, _: model.loss(BATCH, table)
        )
    assert {key for key, p in parameters.items() if p.grad is not None} == set(expected)
    for owned in (set(tuned.trainable), set(parameters) - set(tuned.trainable)):
        keys = owned & set(expected)
        wanted = torch.cat([expected[key].flatten() for key in keys])
        found = torch.cat([parameters[key].grad.flatten() for key in keys])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        if (name, recommender, dtype) == ("vlmo", "lattice", torch.float32):
            tolerance = 1e-4  # differences of cosines above .996, of which float32 leaves a digit less
        assert (found - wanted).norm() < tolerance * wanted.norm()
