"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


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
