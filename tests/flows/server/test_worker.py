from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect.settings import get_current_settings

from flows.server import worker
from flows.server.worker import main, run_worker, wait_for_api


def test_without_an_address_the_worker_says_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(SystemExit, match="PREFECT_API_URL is not set"):
        asyncio.run(wait_for_api(1))


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(
        SystemExit, match=r"http://127\.0\.0\.1:9/api does not answer after 0 s; is the server up\?"
    ):
        asyncio.run(wait_for_api(0.1))


def test_the_command_line_names_the_worker_after_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[object] = []

    async def remember(*arguments: object) -> int:
        got.extend(arguments)
        return 0

    monkeypatch.setattr(worker, "run_worker", remember)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert main(["--ready-file", "ready", "--timeout", "3"]) == 0
    assert str(got[0]).startswith("tandem-")
    assert got[1:] == [Path("ready"), 3.0]
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"


@pytest.mark.prefect
@pytest.mark.xdist_group("prefect")
def test_a_worker_says_when_it_is_ready_and_ends_on_a_signal(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(
        worker, "end_children", lambda grace_s: ended.append(True)
    )  # the server is a child, too
    monkeypatch.setenv("PREFECT_API_URL", str(get_current_settings().api.url))
    ready = tmp_path / "ready"

    def stop_once_ready() -> None:
        until = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_ready, daemon=True).start()
    assert asyncio.run(run_worker("here", ready, 60)) == 0
    assert ready.exists()
    assert ended == [True]
