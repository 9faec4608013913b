from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from flows.server.places import (
    ProcessId,
    ServerRecord,
    absolute_store,
    default_store,
    is_healthy,
    running_server,
    state_home,
)


def own_id() -> ProcessId:
    return ProcessId(pid=os.getpid(), created=psutil.Process().create_time())


def record(api_url: str, launcher: ProcessId | None = None) -> ServerRecord:
    return ServerRecord(
        store="/shop", api_url=api_url, ui_url="http://127.0.0.1:1", launcher=launcher or own_id()
    )


@pytest.fixture
def api() -> str:
    """The address of something that answers /api/health as a server does."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/api"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_local_store_becomes_absolute_and_a_url_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_store("shop") == str(tmp_path / "shop")
    assert absolute_store("s3://bucket/shop") == "s3://bucket/shop"


def test_the_default_store_is_the_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_store() == str(tmp_path / ".tandem")
    monkeypatch.setenv("TANDEM_STORE", "memory://shop")
    assert default_store() == "memory://shop"


def test_each_store_has_a_state_folder_of_its_own_that_a_person_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    first, second = state_home("/data/shop/.tandem"), state_home("/data/films/.tandem")
    assert first.parent == second.parent == tmp_path
    assert first.name.startswith("shop-tandem-")
    assert first.name != second.name
    assert state_home("/data/shop/../shop/.tandem") == first


def test_the_state_folder_follows_the_xdg_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_home("s3://bucket/shop").parent == tmp_path / "tandem"


def test_a_record_is_read_back_and_removed(tmp_path: Path) -> None:
    written = record("http://127.0.0.1:4200/api")
    written.write(tmp_path)
    assert ServerRecord.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["server.json"]
    ServerRecord.remove(tmp_path)
    assert ServerRecord.read(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"store": 1}'])
def test_a_damaged_record_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.json").write_text(text)
    assert ServerRecord.read(tmp_path) is None


def test_a_process_is_found_again_and_another_one_of_its_number_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    taken = ProcessId.of(child.pid)
    assert taken is not None
    assert taken.find() is not None
    assert ProcessId(pid=taken.pid, created=taken.created - 60).find() is None
    child.kill()
    child.wait()
    assert taken.find() is None
    assert ProcessId.of(child.pid) is None


def test_health_is_asked_of_http_addresses_only(api: str) -> None:
    assert is_healthy(api)
    assert not is_healthy(api + "/other")
    assert not is_healthy(f"http://127.0.0.1:{free_port()}/api", timeout_s=0.5)
    assert not is_healthy("file:///etc/passwd")
    assert not is_healthy("")


def test_a_running_server_is_found_by_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    assert running_server("/shop") == ""
    home = state_home("/shop")
    home.mkdir()
    record(api).write(home)
    assert running_server("/shop") == api
    assert running_server("/another") == ""


def test_a_record_whose_launcher_is_gone_names_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    home = state_home("/shop")
    home.mkdir()
    own = own_id()
    record(api, ProcessId(pid=own.pid, created=own.created - 1000)).write(home)
    assert running_server("/shop") == ""


def test_an_address_in_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, api: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", api)
    assert running_server("/shop") == api
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    assert running_server("/shop") == ""
