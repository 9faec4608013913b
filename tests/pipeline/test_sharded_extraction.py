"""Several workers on one extraction: one good artefact, whatever their number, order, place or death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.errors import FeatureError
from features.sharding import BlocksMissingError, Shard
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.sharing import SharedFolder
from pipeline.stages import extract_shards
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.extract_shards import (
    ShardsMissing,
    assemble_shards,
    can_shard,
    encode_one_shard,
    extract_shard,
)
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult
from pipeline.store import Artefact, Store
from tests.pipeline.small_runs import SMALL_DATASET

SETTINGS = {"rows_per_part": 5, "batch_size": 4}
CONFIG = FeaturesConfig.model_validate(
    {"encoder": "tiny", "modality": "image", "extraction": SETTINGS, "device": "cpu"}
)


def with_dataset(store: Store) -> Store:
    """A store that holds the small dataset under the name shop."""
    store.name("shop", prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact)
    return store


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    store = with_dataset(Store(tmp_path_factory.mktemp("unsharded") / "store"))
    return extract_features(store, "shop", CONFIG).artefact


def parts_of(artefact: Artefact) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in artefact.manifest.files.items()}


def leftovers(store: Store) -> list[str]:
    return [
        path.name
        for folder in (".shards", ".drafts")
        for path in (Path(store.url) / folder).glob("*")
        if (Path(store.url) / folder).is_dir()
    ]


def as_result(outcome: StageResult | ShardsMissing) -> StageResult:
    assert isinstance(outcome, StageResult)
    return outcome


def test_the_last_shard_makes_the_artefact_of_one_process(
    open_place: Callable[..., Store], unsharded: Artefact
) -> None:
    """Each shard on another machine: they share nothing but the store."""
    with_dataset(open_place())
    first = extract_shard(open_place("cache-a"), "shop", CONFIG, Shard(2, 3))
    assert isinstance(first, ShardsMissing)
    assert (first.missing, first.ref) == ((0, 1), unsharded.ref)
    second = extract_shard(open_place("cache-b"), "shop", CONFIG, Shard(0, 3))
    assert isinstance(second, ShardsMissing)
    assert second.line().endswith("2 of 3 shards are whole; missing: 1")
    made = as_result(extract_shard(open_place("cache-c"), "shop", CONFIG, Shard(1, 3)))
    assert not made.reused
    assert made.artefact.key == unsharded.key
    assert parts_of(made.artefact) == parts_of(unsharded)
    facts, expected = dict(made.artefact.manifest.facts), dict(unsharded.manifest.facts)
    assert facts.pop("shards") == 3
    # Of several processes, each with the memory of its machine, none knows the peak.
    differ = {"seconds", "items_per_s", "waiting_share", "summary", "workers", "peak_memory_bytes"}
    assert {name: facts[name] for name in facts.keys() - differ} == {
        name: expected[name] for name in expected.keys() - differ
    }
    assert all(not problems for problems in open_place("cache-d").verify_all().values())
    again = as_result(extract_shard(open_place("cache-a"), "shop", CONFIG, Shard(0, 3)))
    assert again.reused


def test_nothing_is_left_behind(local_store: Store) -> None:
    with_dataset(local_store)
    for index in range(2):
        extract_shard(local_store, "shop", CONFIG, Shard(index, 2))
    assert leftovers(local_store) == []


def shell(store: str, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    settings = [f"--set=extraction.{name}={value}" for name, value in SETTINGS.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.pipeline.sharding_shell", "extract", "shop", "--store", store),
            *("--set", "device=cpu", *settings, *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TANDEM_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("place", ["local", "objects"])
def test_two_processes_at_once_leave_one_good_artefact(
    tmp_path: Path, unsharded: Artefact, place: str
) -> None:
    import tests.pipeline.store_world  # noqa: F401 - registers objects://

    url = str(tmp_path / "store") if place == "local" else f"objects://{tmp_path / 'bucket'}"
    store = with_dataset(Store(url, cache=tmp_path / "cache"))
    workers = [
        shell(url, tmp_path / f"cache-{index}", "--json", "--shard", f"{index}/2") for index in range(2)
    ]
    documents = []
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        documents.append(json.loads(out))
    made = [document for document in documents if "key" in document]
    assert made, "at least one of them sees that all is whole"
    assert {document["ref"] for document in documents} == {unsharded.ref}
    artefacts = store.list("features")
    assert [parts_of(artefact) for artefact in artefacts] == [parts_of(unsharded)]
    assert all(not problems for problems in store.verify_all().values())
    if place == "local":
        assert leftovers(store) == []


def test_the_command_line_says_how_far_it_is_and_names_the_result(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    store = with_dataset(Store(url))
    outputs = []
    for arguments in (["--shard", "1/2"], ["--shard", "0/2", "--name", "looks"], ["--shard", "2/2"]):
        worker = shell(url, tmp_path, *arguments)
        out, err = worker.communicate(timeout=120)
        outputs.append((worker.returncode, out + err))
    assert outputs[0][0] == outputs[1][0] == 0
    assert "1 of 2 shards are whole; missing: 0" in outputs[0][1]
    assert store.get("looks").kind == "features"
    assert outputs[2][0] == 2
    assert "there is no shard '2/2'" in outputs[2][1]


def test_a_worker_that_dies_costs_its_unfinished_blocks_only(
    local_store: Store, unsharded: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dataset(local_store)
    published: list[str] = []

    def die_at_the_third(shared: SharedFolder, name: str) -> None:
        published.append(name)
        if len(published) == 3:
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(SharedFolder, "publish", die_at_the_third)
        with pytest.raises(SystemExit):
            extract_shard(local_store, "shop", CONFIG, Shard(0, 1))
    report = encode_one_shard(local_store, "shop", CONFIG, Shard(0, 1))
    assert report is not None
    assert report.kept == 3
    made = assemble_shards(local_store, "shop", CONFIG, 1)
    assert parts_of(made.artefact) == parts_of(unsharded)


def test_force_makes_all_again_once_for_all_workers(local_store: Store, unsharded: Artefact) -> None:
    with_dataset(local_store)
    extract_features(local_store, "shop", CONFIG)
    first = extract_shard(local_store, "shop", CONFIG, Shard(0, 2), force=True)
    assert isinstance(first, ShardsMissing)
    assert first.report is not None
    assert first.report.encoded > 0
    made = as_result(extract_shard(local_store, "shop", CONFIG, Shard(1, 2), force=True))
    assert not made.reused
    assert made.artefact.manifest.facts["reused"] == 0
    assert parts_of(made.artefact) == parts_of(unsharded)
    assert leftovers(local_store) == []


def test_two_forced_workers_that_finish_together_both_get_the_artefact(local_store: Store) -> None:
    with_dataset(local_store)
    extract_features(local_store, "shop", CONFIG)
    outcomes: list[Any] = []
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(20)
        outcomes.append(extract_shard(Store(local_store.url), "shop", CONFIG, Shard(index, 2), force=True))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [outcome for outcome in outcomes if isinstance(outcome, StageResult)]
    assert len(outcomes) == 2
    assert made
    assert all(not problems for problems in local_store.verify_all().values())
    assert leftovers(local_store) == []


def test_retrying_keeps_what_is_there(local_store: Store) -> None:
    with_dataset(local_store)
    plain = extract_features(local_store, "shop", CONFIG).artefact
    for index in range(2):
        outcome = extract_shard(local_store, "shop", CONFIG, Shard(index, 2), retry_failed=True)
    made = as_result(outcome)
    assert made.artefact.manifest.facts["encoded"] == 0
    assert made.artefact.manifest.facts["n_ok"] == plain.manifest.facts["n_ok"]
    assert parts_of(made.artefact) == parts_of(plain)


def test_missing_shards_are_named_when_asked_for_the_whole(local_store: Store) -> None:
    with_dataset(local_store)
    with pytest.raises(
        BlocksMissingError, match=r"0 of 3 shards are whole; missing: 0, 1, 2; run 0/3, 1/3, 2/3"
    ):
        assemble_shards(local_store, "shop", CONFIG, 3)
    encode_one_shard(local_store, "shop", CONFIG, Shard(1, 3))
    with pytest.raises(
        BlocksMissingError, match=r"1 of 3 shards are whole; missing: 0, 2; run 0/3, 2/3 again"
    ):
        assemble_shards(local_store, "shop", CONFIG, 3)


def test_a_damaged_block_is_told_and_made_again(local_store: Store, unsharded: Artefact) -> None:
    with_dataset(local_store)
    for index in range(2):
        encode_one_shard(local_store, "shop", CONFIG, Shard(index, 2))
    block = next((Path(local_store.url) / ".shards").glob("*/block-00004.parquet"))
    block.write_bytes(block.read_bytes()[:-9])
    with pytest.raises(BlocksMissingError) as raised:
        assemble_shards(local_store, "shop", CONFIG, 2)
    (shard,) = raised.value.shards
    made = as_result(extract_shard(local_store, "shop", CONFIG, Shard(shard, 2)))
    assert parts_of(made.artefact) == parts_of(unsharded)


def test_one_process_loads_the_encoder_once_for_all_its_shards(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dataset(local_store)
    loaded: list[str] = []
    real = extract_shards.load_encoder

    def load(spec: str, **options: Any) -> Any:
        loaded.append(spec)
        return real(spec, **options)

    monkeypatch.setattr(extract_shards, "load_encoder", load)
    extract_shards.loaded_encoder.cache_clear()
    for index in range(4):
        encode_one_shard(local_store, "shop", CONFIG, Shard(index, 4))
    assemble_shards(local_store, "shop", CONFIG, 4)
    assert loaded == ["tiny"]


@pytest.mark.parametrize("encoder", ["given", "shuffled:tiny", "tfidf+dim=8"])
def test_what_is_not_encoded_item_by_item_cannot_be_shared_out(local_store: Store, encoder: str) -> None:
    config = CONFIG.model_copy(update={"encoder": encoder, "modality": "text"})
    assert not can_shard(config)
    with pytest.raises(ConfigError, match="nothing to share out"):
        extract_shard(local_store, "shop", config, Shard(0, 2))


def test_a_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FeatureError, match="there is no shard '3/3'"):
        Shard(3, 3)
