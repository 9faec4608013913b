"""A store in each kind of place."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.store import Store

PLACES = ["local", "memory", "objects"]


@pytest.fixture(params=PLACES)
def place_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty place: a folder, fsspec's memory, or an object store that cannot rename."""
    import tests.pipeline.store_world  # noqa: F401 - registers objects://

    return {
        "local": str(tmp_path / "store"),
        "memory": f"memory://{uuid4().hex}/store",
        "objects": f"objects://{tmp_path / 'bucket'}",
    }[request.param]


@pytest.fixture
def open_place(place_url: str, tmp_path: Path) -> Callable[..., Store]:
    """Open that place again, as another process would: with the same cache, or an own one."""

    def open_it(cache: str = "cache", **settings: object) -> Store:
        return Store(place_url, cache=tmp_path / cache, **settings)  # type: ignore[arg-type]  # say only

    return open_it


@pytest.fixture
def any_store(open_place: Callable[..., Store]) -> Store:
    """An empty store in each kind of place."""
    return open_place()


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """An empty store in a local folder."""
    return Store(tmp_path / "store")
