"""Joint training by two processes: it is one process's, its errors are those of a process, and it resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from pipeline.config import parse_config
from pipeline.encoder_specs import resolve_encoder, stored_spec
from pipeline.errors import ConfigError
from pipeline.joint_way import JointWayConfig, PlainJointStages
from pipeline.joint_workers import check_processes
from pipeline.progress import SILENT, Reporter, SilentReporter
from pipeline.stages.train_jointly import HISTORY_FILE, RECOMMENDER_FILE, train_encoder_jointly
from pipeline.store import Artefact, Store
from recommenders.errors import TrainingError
from tests.pipeline.test_joint_stage import dataset_in, way

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("model.safetensors", RECOMMENDER_FILE)
# The one validation is after the last epoch: the epoch it chooses is one in which the encoder was trained.
LATE: dict[str, Any] = {
    "training": {"epochs": 3, "eval_every": 3},
    "joint": {"warmup_epochs": 1, "learning_rate": 1e-4},
}
TEXTS_TRAINED = way(tuning={"frozen_towers": ["image"]}, **LATE)
ALL_TRAINED = way(**LATE)


@dataclass(frozen=True)
class Shop:
    """A store with a small dataset and the features that training starts from."""

    store: Store
    dataset: Artefact
    features: tuple[str, ...]

    def train(
        self,
        n_processes: int,
        config: JointWayConfig = TEXTS_TRAINED,
        *,
        reporter: Reporter = SILENT,
        force: bool = False,
    ) -> Artefact:
        settings = config.training_alone().model_copy(update={"processes": n_processes})
        return train_encoder_jointly(
            self.store, self.dataset.key, self.features, settings, reporter=reporter, force=force
        ).artefact

    def left_in_scratch(self) -> list[Path]:
        return list((Path(self.store.url) / ".drafts").iterdir())


@pytest.fixture(name="shop", scope="module")
def _shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("processes") / "store")
    dataset, config = dataset_in(store), way()
    stages = PlainJointStages(store)
    wanted = [config.extract(modality, "tiny") for modality in config.modalities]
    return Shop(store, dataset, tuple(stages.extract(dataset.key, what).artefact.key for what in wanted))


class Killing(SilentReporter):
    """Kills one process once two epochs are told of."""

    def __init__(self) -> None:
        self.n_epochs = 0

    def say(self, message: str) -> None:
        self.n_epochs += message.startswith("  epoch")
        if self.n_epochs == 2:
            (victim,) = (each for each in multiprocessing.active_children() if each.name == "worker-1")
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)


def _encoder(shop: Shop, artefact: Artefact) -> Encoder:
    return resolve_encoder(shop.store, stored_spec(artefact)).load()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "towers", "n_alike"),
    # A gradient's length changes more than weights do, which with pictures differ a little by epoch 3.
    [(TEXTS_TRAINED, {"text"}, 3), (ALL_TRAINED, {"image", "text"}, 2)],
    ids=["texts", "all"],
)
def test_two_processes_train_what_one_trains(
    config: JointWayConfig, towers: set[str], n_alike: int, shop: Shop
) -> None:
    one, two = shop.train(1, config), shop.train(2, config)
    assert one.manifest.facts["best_epoch"] == two.manifest.facts["best_epoch"] == 3
    assert one.manifest.parameters["processes"] == 1
    assert two.manifest.parameters["processes"] == two.manifest.facts["processes"] == 2
    assert two.key != one.key
    assert "processes" not in one.manifest.identity  # keys of before stay
    for file in FILES:
        alone, together = load_file(one.path(file)), load_file(two.path(file))
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-4, msg=name)
    histories = [pl.read_parquet(artefact.path(HISTORY_FILE)).drop("seconds") for artefact in (one, two)]
    assert {f"gradient_norm_{tower}" for tower in towers} <= set(histories[0].columns)
    assert_frame_equal(*(history.head(n_alike) for history in histories), rel_tol=1e-4)
    assert_frame_equal(*histories, rel_tol=1e-3)
    started, trained = (each.state_dict() for each in (load_encoder("tiny"), _encoder(shop, two)))
    assert max(float((value - trained[name]).abs().max()) for name, value in started.items()) > 5e-4
    assert not shop.left_in_scratch()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_same_call_goes_on(shop: Shop) -> None:
    whole = {file: shop.train(2).manifest.files[file].sha256 for file in FILES}
    with pytest.raises(TrainingError, match=r"Process 1 of the 2 .* was killed \(SIGKILL\).*goes on from"):
        shop.train(2, reporter=Killing(), force=True)
    assert not multiprocessing.active_children()
    again = shop.train(2, force=True)
    assert int(str(again.manifest.facts["resumed_after"])) >= 1
    assert {file: again.manifest.files[file].sha256 for file in FILES} == whole
    assert not shop.left_in_scratch()


@pytest.mark.slow
def test_a_mistake_found_by_a_process_is_told_as_by_one(shop: Shop) -> None:
    nothing_joint = way(training={"epochs": 2}, joint={"warmup_epochs": 2})
    with pytest.raises(TrainingError, match=r"training\.epochs is 2.*Give more epochs") as caught:
        shop.train(2, nothing_joint)
    assert caught.value.__cause__ is None
    assert not multiprocessing.active_children()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_processes(8, torch.device("cpu"))
    check_processes(1, torch.device("cuda"))
    with pytest.raises(ConfigError, match="processes is 2 on GPUs, and torch sees 1"):
        check_processes(2, torch.device("cuda"))


def test_the_number_is_a_setting_of_the_way() -> None:
    assert parse_config({"processes": 2}, JointWayConfig).training_alone().processes == 2
    with pytest.raises(ConfigError, match="processes"):
        parse_config({"processes": 0}, JointWayConfig)
