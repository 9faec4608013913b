"""What the other processes do in tests of several processes on one store."""

import os
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.hardware import describe_hardware, library_versions
from pipeline.store import Draft, Store
from tests.pipeline.store_world import fill, produce, small

N_KEYS = 5

# The server that these processes are forked from asks once for all of them.
describe_hardware()
library_versions()


def open_store(address: tuple[str, str], **settings: Any) -> Store:
    """Open the store with this URL and cache."""
    return Store(address[0], cache=address[1], **settings)


def make_slowly(address: tuple[str, str], folder: Path, name: str) -> None:
    """Make artefact 1 once ``folder/go`` exists, writing down what happens."""

    def say(message: str) -> None:
        (folder / f"{name}.said.tmp").write_text(message)
        (folder / f"{name}.said.tmp").rename(folder / f"{name}.said")

    def make(draft: Draft) -> None:
        with (folder / "made").open("a") as file:
            file.write(f"{name}\n")
        (folder / f"{name}.began").touch()
        while not (folder / "go").exists():
            time.sleep(0.005)
        fill(1)(draft)

    outcome = produce(open_store(address, say=say), 1, make=make)
    (folder / f"{name}.done").write_text(f"{outcome.reused}|{outcome.artefact.key}")


def hang_while_making(address: tuple[str, str], folder: Path) -> None:
    def make(draft: Draft) -> None:
        draft.path("part-00000.bin").write_bytes(b"half")
        (folder / "hanging").touch()
        time.sleep(600)

    produce(open_store(address), 1, make=make)


def fork_and_hang(address: tuple[str, str], folder: Path) -> None:
    """Leave a child behind that was forked while the lock was held, as loader workers are."""

    def make(draft: Draft) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        (folder / "child.tmp").write_text(str(child))
        (folder / "child.tmp").rename(folder / "child")  # whole, once the test sees it
        time.sleep(600)

    produce(open_store(address), 1, make=make)


def write_for_ever(address: tuple[str, str], folder: Path, seed: int) -> None:
    """Make, replace and name artefacts until killed."""
    rng = random.Random(seed)  # noqa: S311 - a test's moments, no secrets
    store = open_store(address)
    (folder / f"ready-{seed}").touch()
    while True:
        number = rng.randrange(N_KEYS)
        resumable, force = rng.random() < 0.5, rng.random() < 0.7
        artefact = produce(store, number, resumable=resumable, force=force).artefact
        store.name(f"name-{number}", artefact)


def collect_for_ever(address: tuple[str, str], folder: Path, seed: int) -> None:
    """Make chains of artefacts and collect them again until killed."""
    rng = random.Random(seed)  # noqa: S311 - a test's moments, no secrets
    store = open_store(address)
    (folder / f"ready-{seed}").touch()
    while True:
        chain = [small(store, f"dataset {seed}", kind="dataset")]
        for depth in range(rng.randrange(1, 5)):
            chain.append(small(store, f"{seed} {depth}", made_from=chain[-1:]))
        store.collect_garbage(older_than=timedelta(0), dry_run=False)
