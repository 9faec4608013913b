"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadGroupScheduling


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadGroupScheduling | None:
    """Keep the tests that need a Prefect server in one worker.

    They are marked with ``xdist_group``, which pytest-xdist 3.8 does not see under pytest 9.2
    (github.com/pytest-dev/pytest-xdist/issues/1386): each worker would start servers of its own.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class OneWorkerForFlows(LoadGroupScheduling):
        """Groups by folder what the mark fails to group."""

        def _split_scope(self, nodeid: str) -> str:
            return "prefect" if nodeid.startswith("tests/flows/") else super()._split_scope(nodeid)

    return OneWorkerForFlows(config, log)


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Find a research data set by its folder's name, or skip: they are not part of the repository.

    Looked for below ``TANDEM_SHARED_DATA``, else below ``../shared/data`` beside the project's folder.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("TANDEM_SHARED_DATA") or default)

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(
                f"needs the data set {name!r} below {root}; set TANDEM_SHARED_DATA to the folder it is in"
            )
        return root / name

    return find


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread: on a busy machine two are many times slower for small models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
