"""The stage that fine-tunes: what it reads, what it leaves, and that held-out interactions change nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from flows.cli import app
from pipeline.config import parse_config
from pipeline.console import EXIT_USER_ERROR, run_app
from pipeline.datasets.config import DatasetConfig
from pipeline.encoder_specs import resolve_encoder, stored_spec
from pipeline.errors import USER_ERRORS
from pipeline.progress import SilentReporter
from pipeline.reading import read_dataset
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.finetune_encoder import (
    HISTORY_FILE,
    FinetuneSettings,
    co_purchases_of,
    digest_of,
    finetune_encoder,
)
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Artefact, Store
from tests.pipeline.small_runs import SMALL_DATASET

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**finetuning: Any) -> FinetuneSettings:
    raw = {
        "epochs": 2,
        "batch_size": 8,
        "chunk_size": 8,
        "held_out_share": 0.2,
        "patience": 0,
        "checkpoint_steps": 1,
        "optimizer": {"learning_rate": 1e-3},
        **finetuning,
    }
    return parse_config({"finetuning": raw, "device": "cpu"}, FinetuneSettings)


WITH_PAIRS = {"objectives": {"image_text": 0.5, "co_purchase": 1.0}}


@dataclass(frozen=True)
class Shop:
    """A store with a small dataset."""

    store: Store
    dataset: Artefact


def shop_at(folder: Path) -> Shop:
    store = Store(folder)
    return Shop(store, prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return shop_at(tmp_path_factory.mktemp("finetune") / "store")


@pytest.fixture(scope="module")
def tuned(shop: Shop) -> Artefact:
    torch.set_num_threads(1)
    return finetune_encoder(shop.store, shop.dataset.key, settings()).artefact


def files_of(encoder: Artefact) -> dict[str, str]:
    """The hashes of all that does not tell the time."""
    return {name: entry.sha256 for name, entry in encoder.manifest.files.items() if name != HISTORY_FILE}


def history(encoder: Artefact) -> pl.DataFrame:
    return pl.read_parquet(encoder.path(HISTORY_FILE)).drop("seconds")


def test_an_encoder_is_kept_with_its_history_lineage_and_figures(shop: Shop, tuned: Artefact) -> None:
    facts, frame = tuned.manifest.facts, history(tuned)
    assert tuned.kind == "encoder"
    assert tuned.slug == "tiny-finetuned"
    assert frame["epoch"].to_list() == [0, 1, 2]
    assert facts["best_epoch"] == frame["retrieval"].arg_max()
    assert facts["retrieval_before"] == frame["retrieval"][0]
    assert facts["retrieval_after"] == frame["retrieval"].max()
    assert facts["peak_memory_bytes"] > 0  # type: ignore[operator]
    assert facts["finetune_seconds"] > 0  # type: ignore[operator]
    assert [ref.key for ref in tuned.manifest.inputs] == [shop.dataset.key]
    assert finetune_encoder(shop.store, shop.dataset.key, settings()).reused


def test_what_comes_out_encodes_and_is_another_encoder(shop: Shop, tuned: Artefact) -> None:
    spec = stored_spec(tuned)
    weights = settings(optimizer={"learning_rate": 1e-2})
    other = finetune_encoder(shop.store, shop.dataset.key, weights).artefact
    best = [artefact for artefact in (tuned, other) if artefact.manifest.facts["best_epoch"]]
    assert best
    plain = resolve_encoder(shop.store, "tiny").load()
    for artefact in best:
        changed = resolve_encoder(shop.store, stored_spec(artefact)).load()
        pixels = torch.randn(2, 3, plain.info.image_size_px, plain.info.image_size_px)
        assert not torch.allclose(changed.encode_images(pixels), plain.encode_images(pixels), atol=1e-4)
    features = extract_features(shop.store, shop.dataset.key, FeaturesConfig(encoder=spec, modality="image"))
    assert tuned.key in [ref.key for ref in features.artefact.manifest.inputs]


def test_it_can_be_tuned_again(shop: Shop, tuned: Artefact) -> None:
    again = settings(epochs=1).model_copy(update={"encoder": stored_spec(tuned)})
    twice = finetune_encoder(shop.store, shop.dataset.key, again).artefact
    assert twice.slug == "tiny-finetuned"
    assert {ref.key for ref in twice.manifest.inputs} == {shop.dataset.key, tuned.key}
    assert twice.key != tuned.key


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 1}, {"chunk_size": 4}, {"optimizer": {"learning_rate": 2e-3}}, {"augment": {"flip": 0.5}}],
)
def test_each_setting_that_counts_gives_another_key(
    shop: Shop, tuned: Artefact, changes: dict[str, Any]
) -> None:
    assert finetune_encoder(shop.store, shop.dataset.key, settings(**changes)).artefact.key != tuned.key


def test_how_it_is_done_is_no_part_of_the_key(shop: Shop) -> None:
    assert finetune_encoder(shop.store, shop.dataset.key, settings(checkpoint_steps=3, n_workers=1)).reused


def test_pairs_are_those_of_training(shop: Shop) -> None:
    bought = co_purchases_of(shop.dataset, settings(**WITH_PAIRS).finetuning.objectives.pairs)
    train = read_dataset(shop.dataset).split.train
    common = (train.csr().T @ train.csr()).toarray()
    popularity = np.asarray(train.csr().sum(axis=0)).ravel()
    assert len(bought.pairs) == (np.triu(common, 1) > 0).sum()  # fewer items than neighbours: all of them
    for (a, b), weight in zip(bought.pairs, bought.weights, strict=True):
        assert weight == pytest.approx(common[a, b] / np.sqrt(popularity[a] * popularity[b]), rel=1e-5)


def without_held_out(shop: Shop, folder: Path) -> Shop:
    """The same items and training interactions, with other validation and test interactions."""
    store = Store(folder)

    def make(draft: Any) -> None:
        for path in shop.dataset.paths():
            name = path.relative_to(Path(shop.dataset.folder_url))
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        table = pl.read_parquet(draft.path("interactions.parquet"))
        held_out = pl.col("split") != "train"
        other = (pl.col("item_row") + 17) % 40
        changed = table.with_columns(
            pl.when(held_out).then(other).otherwise(pl.col("item_row")).alias("item_row")
        )
        changed.write_parquet(draft.path("interactions.parquet"))
        draft.record(**shop.dataset.manifest.facts)

    outcome = store.produce("dataset", slug="other", identity={"other": 1}, make=make)
    return Shop(store, outcome.artefact)


def test_held_out_interactions_change_nothing(shop: Shop, tmp_path: Path) -> None:
    """Not a weight, not a figure, not even the key; training interactions change them all."""
    other = without_held_out(shop, tmp_path / "other")
    for label, differs in (("train", False), ("valid", True), ("test", True)):
        first, second = (
            pl.read_parquet(each.dataset.path("interactions.parquet")).filter(pl.col("split") == label)
            for each in (shop, other)
        )
        assert len(first) > 0
        assert first["item_row"].equals(second["item_row"]) is not differs
    config = settings(**WITH_PAIRS)
    ours, theirs = (finetune_encoder(each.store, each.dataset.key, config).artefact for each in (shop, other))
    assert ours.manifest.facts["best_epoch"] == theirs.manifest.facts["best_epoch"]
    assert history(ours).equals(history(theirs))
    assert {k: v for k, v in files_of(ours).items() if k.endswith(".safetensors")} == {
        k: v for k, v in files_of(theirs).items() if k.endswith(".safetensors")
    }
    assert ours.key == theirs.key
    losses = history(ours)["loss_co_purchase"].drop_nulls()
    assert len(losses) == 2  # the pairs were learnt from

    train = read_dataset(shop.dataset).split.train
    bought = co_purchases_of(shop.dataset, config.finetuning.objectives.pairs)
    fewer = type(bought)(bought.pairs, bought.weights, train.user_rows[1:], train.item_rows[1:], 40)
    assert digest_of(fewer) != digest_of(bought)


def test_interactions_are_no_part_of_the_key_where_nothing_is_learnt_from_them(
    shop: Shop, tuned: Artefact
) -> None:
    raw = {**SMALL_DATASET, "split": {"rule": "leave_one_out"}}
    split = prepare_dataset(shop.store, DatasetConfig.model_validate(raw)).artefact
    assert split.key != shop.dataset.key
    again = finetune_encoder(shop.store, split.key, settings())
    assert again.reused
    assert again.artefact.key == tuned.key


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pipeline.stages.finetune_encoder import finetune_encoder
from pipeline.store import Store
from tests.pipeline.test_finetune_stage import settings
finetune_encoder(Store(sys.argv[1]), sys.argv[2], settings(epochs=3))
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(shop: Shop, tmp_path: Path) -> None:
    whole = finetune_encoder(shop.store, shop.dataset.key, settings(epochs=3)).artefact
    other = shop_at(tmp_path / "store")
    command = [sys.executable, "-c", SCRIPT, other.store.url, other.dataset.key]
    killed = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    limit = time.monotonic() + 120

    def checkpoints() -> list[Path]:
        return list(Path(other.store.url).rglob("finetuning.safetensors"))

    while not checkpoints():
        assert time.monotonic() < limit
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.store.list("encoder") == []
    resumed = finetune_encoder(other.store, other.dataset.key, settings(epochs=3)).artefact
    assert resumed.key == whole.key
    assert files_of(resumed) == files_of(whole)
    assert history(resumed).equals(history(whole))
    assert checkpoints() == []  # cleared away
    assert HISTORY_FILE in resumed.manifest.files


class InterruptingReporter(SilentReporter):
    """Presses Ctrl-C after some updates."""

    def __init__(self, after: int) -> None:
        self.after = after

    def progress(self, description: str) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def opened() -> Any:
            def advance(done: int, _total: int) -> None:
                if done == self.after:
                    raise KeyboardInterrupt

            yield advance

        assert description == "fine-tuning tiny"
        return opened()


def test_interrupted_it_leaves_nothing_but_what_it_goes_on_from(tmp_path: Path) -> None:
    shop = shop_at(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        finetune_encoder(shop.store, shop.dataset.key, settings(), reporter=InterruptingReporter(3))
    assert shop.store.list("encoder") == []
    resumed = finetune_encoder(shop.store, shop.dataset.key, settings()).artefact
    assert resumed.manifest.facts["resumed_after"] == 3
    assert not list(Path(shop.store.url).rglob("finetuning.safetensors"))


def test_the_command_tunes_names_and_prints_json(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", shop.dataset.key, "--epochs", "1", "--batch-size", "8", "--mode", "last-n"]
    command += ["--set", "finetuning.tuning.last_n=1", "--set", "device=cpu", "--name", "mine", "--json"]
    assert run_app(app, [*command, "--store", shop.store.url]) == 0
    document = json.loads(capsys.readouterr().out)
    named = shop.store.get("mine", "encoder")
    assert document["ref"] == named.ref
    assert document["summary"]["best epoch"] == named.manifest.facts["best_epoch"]
    shown = named.manifest.parameters["finetuning"]
    assert shown["tuning"]["mode"] == "last-n"  # type: ignore[index, call-overload]


def test_mistakes_are_told_in_a_line(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", shop.dataset.key, "--encoder", "random", "--store", shop.store.url]
    assert run_app(app, command) == EXIT_USER_ERROR
    assert "no parameters to train" in capsys.readouterr().err
    with pytest.raises(USER_ERRORS, match="is no VLMo"):
        finetune_encoder(shop.store, shop.dataset.key, settings(objectives={"matching": 1.0}))
