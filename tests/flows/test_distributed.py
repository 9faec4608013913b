"""Shards of an extraction as tasks: in one process, and on two Dask workers of which one is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from features.sharding import shard_of
from flows.extract_features import extract_features_flow
from flows.shards import Sharing, extract_shards_flow
from flows.tasks import value_of
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.settings import inputs_of
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Artefact, Store

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
]
CONFIG = FeaturesConfig.model_validate(
    {
        "encoder": "tiny",
        "modality": "image",
        "device": "cpu",
        "extraction": {"rows_per_part": 4, "batch_size": 2, "n_workers": 1},
    }
)


def form(config: FeaturesConfig, sharing: Sharing) -> dict[str, Any]:
    """The form of extract-features, filled in."""
    return inputs_of(config, "encoder", "modality", sharing=sharing)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("distributed") / "store")
    dataset = DatasetConfig.model_validate({"demo": {"n_items": 400, "n_users": 20, "image_size_px": 32}})
    made.name("shop", prepare_dataset(made, dataset).artefact)
    return made


@pytest.fixture(scope="module")
def expected(store: Store) -> dict[str, str]:
    return parts_of(extract_features(store, "shop", CONFIG).artefact)


def parts_of(artefact: Artefact) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in artefact.manifest.files.items()}


def test_shards_in_the_flow_s_process_make_the_artefact_of_one_extraction(
    store: Store, expected: dict[str, str]
) -> None:
    options: dict[str, Any] = {**form(CONFIG, Sharing(shards=3)), "store": store.url}
    state = extract_features_flow("shop", **options, force=True, return_state=True)
    assert state.name == "Completed"
    made = store.get(value_of(state), "features")
    assert parts_of(made) == expected
    assert made.manifest.facts["shards"] == 3
    again = extract_features_flow("shop", **options, return_state=True)
    assert again.name == "Cached"


def test_what_cannot_be_shared_out_is_extracted_as_ever(store: Store) -> None:
    config = CONFIG.model_copy(update={"encoder": "tfidf+dim=4", "modality": "text"})
    state = extract_features_flow(
        "shop", **form(config, Sharing(shards=2)), store=store.url, return_state=True
    )
    assert state.name == "Completed"


def test_a_mistake_ends_the_flow_with_its_message(tmp_path: Path) -> None:
    state = extract_features_flow(
        "toys", **form(CONFIG, Sharing(shards=2)), store=str(tmp_path), return_state=True
    )
    assert state.is_failed()
    assert "'toys'" in str(state.message)


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prefect_dask.task_runners", None)
    with pytest.raises(ConfigError, match=r"install the extra `distributed`"):
        Sharing(workers=2).task_runner()


def dask_workers() -> list[psutil.Process]:
    """The worker processes that a cluster of this process has started."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]


class Killer(threading.Thread):
    """Kills a Dask worker in the middle of a shard, and remembers which blocks were whole."""

    def __init__(self, store: Store) -> None:
        super().__init__(daemon=True)
        self.shards = Path(store.url) / ".shards"
        self.over = threading.Event()
        self.whole: dict[str, int] = {}
        """When each block was written that was whole before the kill."""

    def run(self) -> None:
        while not self.over.is_set():
            blocks = self.blocks()
            done = Counter(shard_of(int(name[6:11]), 100, 4) for name in blocks)
            begun = [shard for shard, count in done.items() if 2 <= count < 20]
            workers = [worker for worker in dask_workers() if self.works(worker)] if begun else []
            if workers:
                self.whole = blocks
                os.kill(workers[0].pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    def works(self, worker: psutil.Process) -> bool:
        """Whether a worker has files of the shards open, be it only the lock of its own."""
        try:
            return any(Path(file.path).is_relative_to(self.shards) for file in worker.open_files())
        except psutil.Error:
            return False

    def blocks(self) -> dict[str, int]:
        """Name of each whole block -> when it was written, in ns."""
        return {path.name: path.stat().st_mtime_ns for path in self.shards.glob("*/block-*")}


@pytest.mark.slow
def test_a_killed_dask_worker_costs_its_unfinished_blocks_only(
    store: Store, expected: dict[str, str]
) -> None:
    pytest.importorskip("prefect_dask", reason="the extra `distributed` is not installed")
    killer = Killer(store)
    killer.start()
    sharing = Sharing(shards=4, workers=2)
    again = {"force": True, "retry_failed": False}
    try:
        runner = sharing.task_runner()
        assert runner is not None
        subflow = extract_shards_flow.with_options(task_runner=runner)
        state = subflow(
            "shop", config=CONFIG, n_shards=4, store=store.url, again=again, submit=True, return_state=True
        )
    finally:
        killer.over.set()
        killer.join()
        for worker in dask_workers():
            worker.kill()
    assert state.name == "Completed", state.message
    assert 1 <= len(killer.whole) < 100, "it was killed in the middle"
    reports = value_of(state)
    assert sum(report["blocks"] for report in reports) == 100
    assert sum(report["kept"] for report in reports) > 0, "the killed worker's whole blocks are kept"
    after = killer.blocks()
    assert len(after) == 100
    assert {name: after[name] for name in killer.whole} == killer.whole, "no whole block is made twice"
    options: dict[str, Any] = {**form(CONFIG, Sharing(shards=4)), "store": store.url}
    whole = extract_features_flow("shop", **options, force=True, return_state=True)
    made = store.get(value_of(whole), "features")
    assert parts_of(made) == expected
    assert [*killer.shards.iterdir()] == []
