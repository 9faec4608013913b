"""Joint training as stages: what each leaves, how they hang together, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from features.encoders.registry import load_encoder
from flows.cli import app
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import parse_config
from pipeline.console import EXIT_USER_ERROR, run_app
from pipeline.datasets.config import DatasetConfig
from pipeline.encoder_specs import resolve_encoder, stored_spec
from pipeline.errors import ConfigError
from pipeline.joint_way import JointResult, JointWayConfig, PlainJointStages, run_joint
from pipeline.stages.compare_features import compare_features
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.measure_joint import measure_joint
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.train_jointly import HISTORY_FILE, RECOMMENDER_FILE, train_encoder_jointly
from pipeline.stages.train_recommender import train_recommender
from pipeline.store import Artefact, Store
from tests.pipeline.small_runs import SMALL_DATASET

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parents[2]
RAW: dict[str, Any] = {
    "encoder": "tiny",
    "model": "vbpr",
    "modalities": ["image", "text"],
    "device": "cpu",
    "training": {"epochs": 3, "batch_size": 64, "learning_rate": 0.01, "patience": 0},
    "joint": {"warmup_epochs": 1, "learning_rate": 1e-3, "ramp_steps": 0, "negative_pool": 8},
    "live": {"chunk": 16},
}


def way(**changes: Any) -> JointWayConfig:
    raw = dict(RAW)
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(raw, JointWayConfig)


@dataclass(frozen=True)
class Shop:
    """A store with a small dataset, and what a joint training left there."""

    store: Store
    dataset: Artefact
    made: JointResult

    @property
    def encoder(self) -> Artefact:
        assert self.made.encoder is not None
        return self.made.encoder.artefact

    @property
    def run(self) -> Artefact:
        assert self.made.run is not None
        return self.made.run.artefact


def dataset_in(store: Store) -> Artefact:
    return prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact


@pytest.fixture(name="shop", scope="module")
def _shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("joint") / "store")
    dataset = dataset_in(store)
    return Shop(store, dataset, run_joint(way(), PlainJointStages(store), dataset.key))


def test_every_artefact_is_there_and_linked(shop: Shop) -> None:
    start = [stage.artefact for stage in shop.made.start]
    after = [stage.artefact for stage in shop.made.features]
    assert shop.encoder.slug == "tiny-joint-vbpr-seed-0"
    assert {ref.key for ref in shop.encoder.manifest.inputs} == {shop.dataset.key, *(a.key for a in start)}
    for artefact in after:
        assert shop.encoder.key in {ref.key for ref in artefact.manifest.inputs}
        assert artefact.manifest.parameters["encoder"] == stored_spec(shop.encoder)
    used = {ref.key for ref in shop.run.manifest.inputs}
    assert used == {shop.dataset.key, shop.encoder.key, *(a.key for a in after)}
    assert shop.run.manifest.parameters["feature_set"] == "tiny-joint-vbpr image+text"
    assert shop.made.index is not None
    assert shop.run.key in {ref.key for ref in shop.made.index.artefact.manifest.inputs}
    assert "joint" in shop.run.manifest.parameters
    for file in ("metrics.parquet", "per_user.parquet", "item_embeddings.parquet", HISTORY_FILE):
        assert file in shop.run.manifest.files


def test_nothing_is_done_twice(shop: Shop) -> None:
    again = run_joint(way(), PlainJointStages(shop.store), shop.dataset.key)
    assert all(stage.reused for stage in again.all())


def test_the_history_tells_warm_up_from_joint_epochs(shop: Shop) -> None:
    history = pl.read_parquet(shop.encoder.path(HISTORY_FILE))
    assert history["joint"].to_list() == [0.0, 1.0, 1.0]
    for part in ("image", "text", "recommender"):
        norms = history[f"gradient_norm_{part}"].to_list()
        assert norms[0] is None
        assert min(norms[1:]) > 0
    best = shop.encoder.manifest.facts["best_epoch"]
    assert best == history["valid_recall@20"].arg_max() + 1  # type: ignore[operator]


def test_the_run_measures_what_validation_saw(shop: Shop) -> None:
    """The features extracted with the kept encoder are those that training ended with."""
    history = pl.read_parquet(shop.encoder.path(HISTORY_FILE))
    best = int(str(shop.encoder.manifest.facts["best_epoch"]))
    metrics = pl.read_parquet(shop.run.path("metrics.parquet"))
    valid = metrics.filter((pl.col("part") == "valid") & (pl.col("metric") == "recall@20"))["value"][0]
    assert valid == pytest.approx(history["valid_recall@20"][best - 1], abs=0.02)


def test_the_trained_encoder_differs_where_it_was_trained(shop: Shop) -> None:
    before = load_encoder("tiny").state_dict()
    after = resolve_encoder(shop.store, stored_spec(shop.encoder)).load().state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if shop.encoder.manifest.facts["best_epoch"] == 1:
        assert not moved  # validation chose the warm-up's end
    else:
        assert len(moved) > len(before) // 2
    kept, measured = (
        load_file(artefact.path(file))
        for artefact, file in ((shop.encoder, RECOMMENDER_FILE), (shop.run, "model.safetensors"))
    )
    assert kept.keys() == measured.keys()
    assert all(torch.equal(value, measured[name]) for name, value in kept.items())


def test_a_joint_run_stands_in_a_comparison_beside_a_frozen_one(shop: Shop) -> None:
    start = [stage.artefact.key for stage in shop.made.start]
    frozen = train_recommender(shop.store, shop.dataset.key, start, way().run())
    made = compare_features(shop.store, [shop.run.key, frozen.artefact.key], ComparisonConfig())
    table = pl.read_parquet(made.artefact.path("comparison.parquet"))
    assert set(table["feature_set"]) == {"tiny image+text", "tiny-joint-vbpr image+text"}


def test_held_out_test_pairs_change_nothing(tmp_path: Path, shop: Shop) -> None:
    """The stage that trains never reads the test part."""
    store = Store(tmp_path / "store")
    dataset = dataset_in(store)
    path = dataset.path("interactions.parquet")
    table = pl.read_parquet(path)
    other = table.with_columns(
        pl.when(pl.col("split") == "test")
        .then((pl.col("item_row") + 1) % table["item_row"].max())
        .otherwise(pl.col("item_row"))
        .alias("item_row")
    )
    other.write_parquet(path)
    config = way()
    wanted = [config.extract(modality, "tiny") for modality in config.modalities]
    features = [extract_features(store, dataset.key, what).artefact.key for what in wanted]
    trained = train_encoder_jointly(store, dataset.key, features, config.training_alone()).artefact
    for file in ("model.safetensors", RECOMMENDER_FILE):
        assert trained.manifest.files[file].sha256 == shop.encoder.manifest.files[file].sha256


def test_killed_and_started_again_equals_uninterrupted(tmp_path: Path, shop: Shop) -> None:
    folder = tmp_path / "store"
    dataset = dataset_in(Store(folder))
    command = [sys.executable, "-m", "tests.pipeline.joint_shell", str(folder), dataset.key, json.dumps(RAW)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    store = Store(folder)
    made = run_joint(way(), PlainJointStages(store), dataset.key)
    assert time.monotonic() - started < 300
    assert made.encoder is not None
    trained = made.encoder.artefact
    assert int(str(trained.manifest.facts["resumed_after"])) >= 1
    for file in ("model.safetensors", RECOMMENDER_FILE):
        assert trained.manifest.files[file].sha256 == shop.encoder.manifest.files[file].sha256


def test_features_of_another_encoder_stay_as_they_are(shop: Shop) -> None:
    config = way(modalities=["image"])
    other = extract_features(
        shop.store, shop.dataset.key, FeaturesConfig(encoder="random:16", modality="text")
    ).artefact
    made = run_joint(config, PlainJointStages(shop.store), shop.dataset.key, beside=[other.key])
    assert made.encoder is not None
    assert made.run is not None
    assert made.encoder.artefact.manifest.parameters["live_modalities"] == ["image"]
    assert made.run.artefact.manifest.parameters["feature_set"] == "tiny-joint-vbpr image, random:16 text"
    start = made.start[0].artefact.key
    with pytest.raises(ConfigError, match="was not made by"):
        measure_joint(shop.store, made.encoder.artefact.key, [start, other.key])
    with pytest.raises(ConfigError, match="name a feature artefact for each"):
        measure_joint(shop.store, made.encoder.artefact.key, [made.features[0].artefact.key])


def test_an_encoder_that_made_no_features_is_refused(shop: Shop) -> None:
    other = extract_features(
        shop.store, shop.dataset.key, FeaturesConfig(encoder="random:16", modality="text")
    ).artefact
    with pytest.raises(ConfigError, match="tiny made none of the features"):
        train_encoder_jointly(shop.store, shop.dataset.key, [other.key], way().training_alone())
    start = [stage.artefact.key for stage in shop.made.start]
    fused = way(reading={"fuse": "concat"})
    with pytest.raises(ConfigError, match=r"reading\.fuse is 'concat'"):
        train_encoder_jointly(shop.store, shop.dataset.key, start, fused.training_alone())


def test_a_recommender_that_reads_nothing_is_refused_in_words(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_app(app, ["joint", shop.dataset.key, "--store", shop.store.url, "--model", "bpr"])
    assert made == EXIT_USER_ERROR
    assert "bpr" in capsys.readouterr().err


def test_side_networks_train_while_the_encoder_stays(tmp_path: Path, shop: Shop) -> None:
    config = way(trained="side", side={"adapter_width": 8}, modalities=["text"])
    made = run_joint(config, PlainJointStages(shop.store), shop.dataset.key)
    assert made.encoder is not None
    assert made.run is not None
    encoder = resolve_encoder(shop.store, stored_spec(made.encoder.artefact)).load()
    plain = load_encoder("tiny")
    inner = {name: value for name, value in encoder.state_dict().items() if name.startswith("inner.")}
    assert inner.keys() == {f"inner.{name}" for name in plain.state_dict()}
    assert all(torch.equal(value, inner[f"inner.{name}"]) for name, value in plain.state_dict().items())
    assert made.encoder.artefact.key != shop.encoder.key
    texts = ["red shoes", "a blue bag"]
    with torch.no_grad():
        found, before = (each.encode_texts(each.tokenize(texts)) for each in (encoder, plain))
    assert torch.allclose(found, before, rtol=1e-5, atol=1e-5) == (
        made.encoder.artefact.manifest.facts["best_epoch"] == 1
    )
