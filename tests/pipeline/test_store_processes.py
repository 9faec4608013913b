"""Several processes on one store, and processes killed at any moment."""

import multiprocessing as mp
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.store_workers import (
    N_KEYS,
    collect_for_ever,
    fork_and_hang,
    hang_while_making,
    make_slowly,
    open_store,
    write_for_ever,
)
from tests.pipeline.store_world import is_right, produce, small

KILL_ROUNDS = 30
"""Each kills a process at another moment; together they take a few seconds."""


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that start in milliseconds, from a server that has the store imported and holds no locks."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.store_workers"])
    return context


@pytest.fixture(params=["local", "objects"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """URL and cache of a store that processes can share."""
    url = str(tmp_path / "store") if request.param == "local" else f"objects://{tmp_path / 'bucket'}"
    return url, str(tmp_path / "cache")


@contextmanager
def running(context: Any, target: Any, *arguments: Any) -> Iterator[BaseProcess]:
    process = context.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def wait_for(path: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.005)


def test_two_processes_on_one_key_leave_one_good_artefact(
    context: Any, address: tuple[str, str], tmp_path: Path
) -> None:
    open_store(address)
    with running(context, make_slowly, address, tmp_path, "a") as first:
        wait_for(tmp_path / "a.began")
        with running(context, make_slowly, address, tmp_path, "b") as second:
            wait_for(tmp_path / "b.said")
            (tmp_path / "go").touch()
            first.join(60)
            second.join(60)
    assert (tmp_path / "made").read_text() == "a\n", "the second process waits instead of making it too"
    key = open_store(address).list()[0].key
    assert (tmp_path / "a.done").read_text() == f"False|{key}"
    assert (tmp_path / "b.done").read_text() == f"True|{key}"
    assert "Another process is making features/number-1-" in (tmp_path / "b.said").read_text()
    assert [is_right(artefact) for artefact in open_store(address).list()] == [True]


def test_a_process_killed_while_it_holds_the_lock_does_not_hold_up_the_next(
    context: Any, address: tuple[str, str], tmp_path: Path
) -> None:
    open_store(address)
    with running(context, hang_while_making, address, tmp_path) as hanging:
        wait_for(tmp_path / "hanging")
        with running(context, make_slowly, address, tmp_path, "b") as waiting:
            wait_for(tmp_path / "b.said")
            assert not (tmp_path / "b.began").exists(), "it waits while the first is alive"
            (tmp_path / "go").touch()
            os.kill(hanging.pid or 0, signal.SIGKILL)
            waiting.join(60)
    assert (tmp_path / "b.done").read_text().startswith("False|")
    store = open_store(address)
    assert [is_right(artefact) for artefact in store.list()] == [True]
    assert all(not problems for problems in store.verify_all().values())


def test_a_forked_worker_that_outlives_a_killed_maker_does_not_keep_its_lock(
    context: Any, tmp_path: Path
) -> None:
    address = (str(tmp_path / "store"), "")
    with running(context, fork_and_hang, address, tmp_path) as hanging:
        wait_for(tmp_path / "child")
        (tmp_path / "go").touch()
        os.kill(hanging.pid or 0, signal.SIGKILL)
        hanging.join()
        try:
            with running(context, make_slowly, address, tmp_path, "b") as next_maker:
                next_maker.join(25)
                assert not next_maker.is_alive()
        finally:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert is_right(open_store(address).list()[0])


def test_killed_at_any_moment_nothing_whole_is_lost_and_nothing_half_is_read(
    context: Any, address: tuple[str, str], tmp_path: Path
) -> None:
    rng = random.Random(0)  # noqa: S311 - a test's moments, no secrets
    open_store(address)
    seen: set[str] = set()
    for seed in range(KILL_ROUNDS):
        with running(context, write_for_ever, address, tmp_path, seed) as process:
            wait_for(tmp_path / f"ready-{seed}")
            time.sleep(rng.uniform(0, 0.15))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        store = open_store(address)
        artefacts, damaged = store.survey()
        assert damaged == {}
        assert all(is_right(artefact) for artefact in artefacts)
        assert {name: problems for name, problems in store.verify_all().items() if problems} == {}
        now = {artefact.key for artefact in artefacts}
        assert seen <= now, f"round {seed} lost an artefact that was whole before"
        seen = now
    assert len(seen) == N_KEYS, "the rounds were too short to mean anything"
    assert all(is_right(produce(store, number, resumable=True).artefact) for number in range(N_KEYS))


def test_a_killed_collection_leaves_no_artefact_without_its_inputs(
    context: Any, address: tuple[str, str], tmp_path: Path
) -> None:
    rng = random.Random(1)  # noqa: S311 - a test's moments, no secrets
    store = open_store(address)
    kept = small(store, "kept", made_from=[small(store, "source", kind="dataset")])
    store.name("kept", kept)
    for seed in range(KILL_ROUNDS // 2):
        with running(context, collect_for_ever, address, tmp_path, seed) as process:
            wait_for(tmp_path / f"ready-{seed}")
            time.sleep(rng.uniform(0, 0.15))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        artefacts, damaged = store.survey()
        assert damaged == {}
        here = {(artefact.kind, artefact.key) for artefact in artefacts}
        for artefact in artefacts:
            assert {(each.kind, each.key) for each in artefact.manifest.inputs} <= here
        assert {name: problems for name, problems in store.verify_all().items() if problems} == {}
        assert store.get("kept") == kept
    store.collect_garbage(older_than=timedelta(0), dry_run=False)
    left = {artefact.ref for artefact in store.list()}
    wanted = {kept.ref, store.lineage(kept).inputs[0].ref}
    if address[0].startswith(
        "objects://"
    ):  # a killed draft may be alive on another machine: inputs stay a day
        assert wanted <= left
    else:
        assert wanted == left


def test_many_processes_open_a_new_store_at_once(context: Any, address: tuple[str, str]) -> None:
    processes = [context.Process(target=open_store, args=(address,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
