"""Prefect in tests: its own folder, no telemetry, one server for all tests that need one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

_HOME = tempfile.mkdtemp(prefix="tandem-prefect-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(  # before anything imports prefect
    {
        "PREFECT_HOME": _HOME,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "OMP_NUM_THREADS": "1",
    }
)
for _name in ("PREFECT_API_URL", "PREFECT_PROFILE", "TANDEM_STORE", "TANDEM_HOME"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a new database, for the tests marked ``prefect``; flows without a heartbeat."""
    from prefect.settings import temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        temporary_settings(updates={"flows.heartbeat_frequency": None, "logging.to_api.enabled": False}),
        prefect_test_harness(server_startup_timeout=180),
    ):
        yield
