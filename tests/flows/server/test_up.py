"""``tandem up`` with stand-ins for its parts; the real ones come up in ``test_up.py``."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock

from flows.server import up as server
from flows.server.places import ProcessId, ServerRecord, is_healthy, running_server, state_home
from flows.server.processes import Child, is_alive
from flows.server.up import Launcher, ServerConfig, prefect_status, serve, stop_leftovers
from pipeline.errors import ConfigError, PipelineError

SERVER = """
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
HTTPServer(("127.0.0.1", int(os.environ["PREFECT_SERVER_API_PORT"])), Health).serve_forever()
"""
WORKER = """
import pathlib, subprocess, sys, time
flow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(sys.argv[sys.argv.index("--ready-file") + 1]).touch()
time.sleep(300)
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Scripts that stand in for the parts; the test may change them before it starts the launcher."""
    scripts = {"server": SERVER, "worker": WORKER, "deployments": ""}
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    started: list[Child] = []

    def spawn(self: Launcher, name: str, module: list[str], environment: dict[str, str]) -> Child:
        (tmp_path / f"{name}_stand_in.py").write_text(scripts[name])
        module = [f"{name}_stand_in", *module[1:]]
        child = Child(name, module, {**environment, "PYTHONPATH": str(tmp_path)}, self.home / f"{name}.log")
        self.children.append(child)
        started.append(child)
        return child

    monkeypatch.setattr(Launcher, "_spawn", spawn)
    yield scripts
    for child in started:
        child.stop(grace_s=0)


def make_launcher(port: int, words: list[str], **settings: float) -> Launcher:
    config = ServerConfig(store="shop", port=port, **settings)  # type: ignore[arg-type]  # numbers only here
    home = state_home("shop")
    (home / "logs").mkdir(parents=True, exist_ok=True)
    return Launcher(config, home, words.append)


def test_everything_starts_and_the_address_is_said_last(parts: dict[str, str], port: int) -> None:
    words: list[str] = []
    launcher = make_launcher(port, words)
    record = launcher.start()
    try:
        assert is_healthy(record.api_url)
        assert running_server("shop") == record.api_url
        assert f"server up at http://127.0.0.1:{port}" in prefect_status("shop")
        assert words[-1].startswith(f"ready:   http://127.0.0.1:{port} ")
        assert str(Path.cwd() / "shop") in words[0]
    finally:
        launcher.stop()


def test_a_stop_leaves_no_process_no_record_and_a_free_port(parts: dict[str, str], port: int) -> None:
    launcher = make_launcher(port, [])
    record = launcher.start()
    flow = psutil.Process(launcher.children[1].pid).children()
    assert len(flow) == 1
    launcher.stop()
    assert all(child.find() is None for child in record.children)
    assert not any(is_alive(process) for process in flow)
    assert running_server("shop") == ""
    assert ServerRecord.read(launcher.home) is None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_the_worker_stops_before_the_server(
    parts: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = make_launcher(port, [])
    launcher.start()
    stopped: list[str] = []
    stop = Child.stop
    monkeypatch.setattr(Child, "stop", lambda self, *a, **k: (stopped.append(self.name), stop(self, *a, **k)))
    launcher.stop()
    assert stopped == ["worker", "server"]


def test_the_death_of_the_server_stops_the_worker_and_is_told_with_its_log(
    parts: dict[str, str], port: int, tmp_path: Path
) -> None:
    words: list[str] = []
    kept: list[ServerRecord] = []

    def kill_the_server(record: ServerRecord) -> None:
        kept.append(record)
        child = record.children[0].find()
        assert child is not None
        child.kill()

    with pytest.raises(PipelineError, match=r"The server stopped by itself \(exit status -9\)"):
        serve(ServerConfig(store="shop", port=port), words.append, on_ready=kill_the_server)
    assert words[-1].startswith("ready:")
    assert all(child.find() is None for child in kept[0].children)


def test_a_part_that_fails_while_starting_ends_the_start(parts: dict[str, str], port: int) -> None:
    parts["deployments"] = "raise SystemExit('no such flow')"
    with pytest.raises(PipelineError, match=r"(?s)The deployments stopped by itself.*no such flow"):
        serve(ServerConfig(store="shop", port=port), [].append)


def test_a_server_that_never_answers_is_given_up(parts: dict[str, str], port: int) -> None:
    parts["server"] = "import time; time.sleep(300)"
    with pytest.raises(PipelineError, match="server is not ready after 1 s; see the logs in"):
        serve(ServerConfig(store="shop", port=port, start_timeout_s=0.5), [].append)


def test_waiting_is_commented_every_five_seconds(
    parts: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[str] = []
    launcher = make_launcher(port, words)
    clock = itertools.count(step=2.0)
    monkeypatch.setattr(
        server, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    answers = iter([False] * 5 + [True])
    launcher._await("server", lambda: next(answers), "first start")
    assert words == ["server:  starting, 6 s (first start)", "server:  ready after 12.0 s"]


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_each_signal_stops_everything(parts: dict[str, str], port: int, sent: str) -> None:
    words: list[str] = []
    before = signal.getsignal(getattr(signal, sent))
    kept: list[ServerRecord] = []

    def send(record: ServerRecord) -> None:
        kept.append(record)
        threading.Timer(0.2, os.kill, (os.getpid(), getattr(signal, sent))).start()

    serve(ServerConfig(store="shop", port=port), words.append, on_ready=send)
    assert words[-2:] == ["stopping: flows, worker, server", "stopped"]
    assert all(child.find() is None for child in kept[0].children)
    assert signal.getsignal(getattr(signal, sent)) is before


def test_a_signal_during_the_start_stops_what_has_started(parts: dict[str, str], port: int) -> None:
    launcher = make_launcher(port, [])
    launcher.request_stop()
    with pytest.raises(server._Stop):
        launcher.start()
    assert len(launcher.children) == 3
    launcher.stop()
    assert all(child.exit_code is not None for child in launcher.children)


def test_a_second_signal_kills_what_does_not_end(parts: dict[str, str], port: int) -> None:
    parts["worker"] = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKER
    launcher = make_launcher(port, [])
    launcher.start()
    launcher.request_stop()
    launcher.request_stop()
    began = time.monotonic()
    launcher.stop()
    assert launcher.children[1].exit_code == -9
    assert time.monotonic() - began < 10


def test_a_taken_port_is_told_with_one_that_is_free(parts: dict[str, str], port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port {port + 1}"):
            serve(ServerConfig(store="shop", port=port), [].append)


def test_an_address_of_another_machine_is_refused(parts: dict[str, str], port: int) -> None:
    with pytest.raises(ConfigError, match=r"Cannot listen on 192\.0\.2\.1"):  # kept for documentation
        server._check_port("192.0.2.1", port)


def test_listening_to_the_network_needs_a_password(
    parts: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"host is '0.0.0.0': .* PREFECT_SERVER_API_AUTH_STRING"):
        serve(ServerConfig(store="shop", host="0.0.0.0", port=port), [].append)  # noqa: S104 - refused
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "user:password")
    server._check_host("0.0.0.0")  # noqa: S104 - not bound


def test_a_second_server_for_one_store_is_refused_with_the_address_of_the_first(
    parts: dict[str, str], port: int
) -> None:
    home = state_home("shop")
    home.mkdir(parents=True)
    own = ProcessId(pid=os.getpid(), created=psutil.Process().create_time())
    ServerRecord(store="shop", api_url="x", ui_url="http://127.0.0.1:4200", launcher=own).write(home)
    with (
        FileLock(home / "server.lock"),
        pytest.raises(ConfigError, match=f"up already at http://127.0.0.1:4200 .process {own.pid}."),
    ):
        serve(ServerConfig(store="shop", port=port), [].append)


def test_what_a_killed_launcher_left_is_ended_at_the_next_start(parts: dict[str, str], port: int) -> None:
    launcher = make_launcher(port, [])
    record = launcher.start()
    flow = psutil.Process(launcher.children[1].pid).children()
    words: list[str] = []
    stop_leftovers(launcher.home, words.append)  # as if we had been killed
    assert words == ["ending 2 processes that an earlier `tandem up` left behind when it was killed"]
    assert all(child.find() is None for child in record.children)
    assert not any(is_alive(process) for process in flow)
    stop_leftovers(launcher.home, words.append)
    assert len(words) == 1


def test_without_a_server_the_status_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    assert "no server up for /shop (`tandem up` starts one)" in prefect_status("/shop")
    assert "prefect 3." in prefect_status("/shop")
