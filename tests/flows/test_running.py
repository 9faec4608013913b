from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import running
from flows.server.places import state_home
from pipeline.progress import SilentReporter


class Words(SilentReporter):
    """Keeps what is said to the terminal."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A copy of the environment that may be changed."""
    monkeypatch.setattr(os, "environ", {**os.environ, "TANDEM_HOME": str(tmp_path)})
    return monkeypatch


def test_a_server_that_is_up_shows_the_run(environment: pytest.MonkeyPatch) -> None:
    words = Words()
    environment.setattr(running, "running_server", lambda store: "http://127.0.0.1:4242/api")
    running._choose_server("/shop", words)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:4242/api"
    assert os.environ["PREFECT_HOME"] == str(state_home("/shop"))
    assert words.said == ["Prefect: http://127.0.0.1:4242 shows this run"]


def test_without_one_a_temporary_server_uses_the_same_database(environment: pytest.MonkeyPatch) -> None:
    words = Words()
    environment.setattr(running, "running_server", lambda store: "")
    running._choose_server("/shop", words)
    assert "PREFECT_API_URL" not in os.environ
    assert os.environ["PREFECT_HOME"] == str(state_home("/shop"))
    assert state_home("/shop").is_dir()
    assert words.said[0].startswith("Prefect: a temporary server starts")


def test_a_named_server_that_is_silent_is_told(environment: pytest.MonkeyPatch) -> None:
    words = Words()
    environment.setitem(os.environ, "PREFECT_API_URL", "http://127.0.0.1:9/api")
    running._choose_server("/shop", words)
    assert words.said[0].startswith("Prefect: http://127.0.0.1:9/api does not answer; a temporary server")


def test_the_terminal_shows_warnings_of_any_package_but_nothing_of_prefect() -> None:
    code = """
import logging
logging.basicConfig(level=logging.WARNING, format="shown: %(message)s")
from flows.running import _quiet
from prefect.logging.configuration import setup_logging
logging.getLogger("pipeline").setLevel(logging.INFO)
_quiet()
setup_logging()  # as the first flow run does
logging.getLogger("prefect.flow_runs").error("a failed run")
logging.getLogger("pipeline.store").info("a detail")
logging.getLogger("pipeline.store").warning("a warning")
"""
    environment = {**os.environ, "PREFECT_LOGGING_TO_API_ENABLED": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "a warning" in done.stderr
    assert "a failed run" not in done.stderr
    assert "a detail" not in done.stderr


@pytest.mark.parametrize(
    "module", ["flows", "flows.cli", "flows.running", "flows.server.up", "flows.server.places"]
)
def test_prefect_is_not_imported_before_its_environment_is_set(module: str) -> None:
    code = f"import sys, {module}; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
