"""``tandem up``: the server with its UI, the deployments and a worker, started and stopped as one thing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field

from flows.server.environment import LOCAL_HOSTS, server_environment, url_host, worker_environment
from flows.server.places import (
    DEFAULT_STORE,
    ProcessId,
    ServerRecord,
    absolute_store,
    default_store,
    is_healthy,
    running_server,
    state_home,
)
from flows.server.processes import Child, kill, process_tree, terminate
from pipeline.errors import ConfigError, PipelineError

WORKER_GRACE_S = 25.0
"""The worker gives its flow processes 10 s, then reports what they left."""
SERVER_GRACE_S = 10.0
Say = Callable[[str], None]


class ServerConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the server listens, and for which store its flows work."""

    store: str = Field(
        DEFAULT_STORE, min_length=1, description="The store that flows use unless told otherwise."
    )
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; others need a password set."
    )
    port: int = Field(4200, ge=1, le=65535, description="Port of the UI and the API.")
    start_timeout_s: float = Field(180.0, gt=0, description="How long the server may take to answer.")


class _Stop(Exception):  # noqa: N818 - no error: somebody asked us to stop
    """SIGINT, SIGTERM or SIGHUP came."""


def serve(
    config: ServerConfig, say: Say | None = None, *, on_ready: Callable[[ServerRecord], None] | None = None
) -> None:
    """Start everything, say where the UI is, and stay until Ctrl-C, SIGTERM or the end of a part.

    Args:
        config: Store, host, port.
        say: Takes each line for the user; standard error by default.
        on_ready: Called once with the addresses when runs can be started.

    Raises:
        ConfigError: The port is taken, the host is open to the network without a password, or a server for
            this store is up already.
        PipelineError: A part stopped by itself; everything else has been stopped then, too.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201 - a terminal's line
    _check_host(config.host)
    home = state_home(config.store)
    (home / "logs").mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "server.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        record = ServerRecord.read(home)
        where = f" at {record.ui_url} (process {record.launcher.pid})" if record else ""
        raise ConfigError(
            f"A server for this store is up already{where}; open it, or stop it with Ctrl-C."
        ) from None
    with lock:
        stop_leftovers(home, say)
        _check_port(config.host, config.port)
        launcher = Launcher(config, home, say)
        with _signals_to(launcher.request_stop):
            try:
                record = launcher.start()
                if on_ready is not None:
                    on_ready(record)
                    sys.stdout.flush()  # a program that reads us must not wait for a full buffer
                launcher.wait()
            except _Stop:
                say("stopping: flows, worker, server")
            finally:
                launcher.stop()
        say("stopped")


class Launcher:
    """The parts of ``tandem up`` and the order in which they start and stop."""

    def __init__(self, config: ServerConfig, home: Path, say: Say) -> None:
        self.config = config
        self.home = home
        self.say = say
        self.store = absolute_store(config.store)
        self.ui_url = f"http://{url_host(config.host)}:{config.port}"
        self.api_url = f"{self.ui_url}/api"
        self.children: list[Child] = []
        self.stop_requests = 0

    def request_stop(self) -> None:
        """Ask to stop at the next safe point; asked twice, nothing gets time to finish any more."""
        self.stop_requests += 1

    def start(self) -> ServerRecord:
        """Start server, worker and the registration of the flows, and wait until all is ready.

        The three start side by side: importing is most of what they do at first.
        """
        config, home = self.config, self.home
        ready_file = home / "worker.ready"
        ready_file.unlink(missing_ok=True)
        new = not (home / "prefect.db").exists()
        self.say(f"store:   {self.store}")
        self.say(f"state:   {home} (database, logs)")
        server = self._spawn(
            "server", ["prefect", "server", "start"], server_environment(home, config.host, config.port)
        )
        environment = worker_environment(home, self.api_url, self.store)
        timeout = ["--timeout", str(config.start_timeout_s)]
        deployer = self._spawn(
            "deployments", ["flows.deployments", "--working-dir", str(Path.cwd()), *timeout], environment
        )
        worker = self._spawn(
            "worker", ["flows.server.worker", "--ready-file", str(ready_file), *timeout], environment
        )
        record = self._record()
        self._await(
            "server", lambda: is_healthy(self.api_url), "a new database takes 20 to 40 s" if new else ""
        )
        self._await("flows", lambda: deployer.exit_code == 0, "")
        self._await("worker", ready_file.exists, "")
        self.children = [server, worker]
        self.say(f"ready:   {self.ui_url}  (Ctrl-C stops everything)")
        return record

    def _spawn(self, name: str, module: list[str], environment: dict[str, str]) -> Child:
        child = Child(name, module, environment, self.home / "logs" / f"{name}.log")
        self.children.append(child)
        return child

    def _record(self) -> ServerRecord:
        launcher = ProcessId(pid=os.getpid(), created=psutil.Process().create_time())
        children = tuple(found for child in self.children if (found := ProcessId.of(child.pid)))
        record = ServerRecord(
            store=self.store, api_url=self.api_url, ui_url=self.ui_url, launcher=launcher, children=children
        )
        record.write(self.home)
        return record

    def _await(self, what: str, is_ready: Callable[[], bool], hint: str) -> None:
        """Wait for one part, with a word every five seconds; the others must stay alive meanwhile."""
        started = last_word = time.monotonic()
        while not is_ready():
            self._check()
            now = time.monotonic()
            if now - started > self.config.start_timeout_s:
                raise PipelineError(
                    f"{what} is not ready after {now - started:.0f} s; see the logs in {self.home / 'logs'}. "
                    "On a slow machine try again: the second start is quicker."
                )
            if now - last_word >= 5:
                last_word = now
                self.say(f"{what + ':':<8} starting, {now - started:.0f} s" + (f" ({hint})" if hint else ""))
            time.sleep(0.1)
        self.say(f"{what + ':':<8} ready after {time.monotonic() - started:.1f} s")

    def _check(self) -> None:
        """The safe point: raise if somebody asked to stop or a part has ended."""
        if self.stop_requests:
            raise _Stop
        for child in self.children:
            code = child.exit_code
            if code is not None and not (child.name == "deployments" and code == 0):
                raise PipelineError(
                    f"The {child.name} stopped by itself (exit status {code}); the rest is stopped, too. "
                    f"The end of {child.log}:\n{child.log_tail()}"
                )

    def wait(self) -> None:
        """Stay until a signal comes or a part ends.

        Raises:
            PipelineError: A part ended by itself.
        """
        while True:
            self._check()
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop flow processes and worker first, then the server, and whatever is left of either at last."""
        remains = [process for child in self.children for process in process_tree(child.pid)]
        try:
            for child in reversed(self.children):  # the server was started first
                grace_s = SERVER_GRACE_S if child.name == "server" else WORKER_GRACE_S
                child.stop(grace_s, hurry=lambda: self.stop_requests > 1)
        finally:
            kill(remains)
            ServerRecord.remove(self.home)
            (self.home / "worker.ready").unlink(missing_ok=True)


def stop_leftovers(home: Path, say: Say) -> None:
    """End the processes of an earlier launcher that was killed; to be called with the lock held."""
    record = ServerRecord.read(home)
    if record is None:
        return
    left = [process for child in record.children if (process := child.find()) is not None]
    if left:
        say(f"ending {len(left)} processes that an earlier `tandem up` left behind when it was killed")
        below = [process for parent in left for process in process_tree(parent.pid)]
        kill(terminate(reversed(left), WORKER_GRACE_S))
        kill(below)
    ServerRecord.remove(home)


def prefect_status(store: str = "") -> str:
    """Which Prefect is installed and whether a server is up for the store, for ``tandem doctor``."""
    installed = ", ".join(f"{name} {version(name)}" for name in ("prefect", "fastapi"))
    chosen = store or default_store()
    api_url = running_server(chosen)
    if api_url:
        return f"{installed}; server up at {api_url.removesuffix('/api')}"
    return f"{installed}; no server up for {absolute_store(chosen)} (`tandem up` starts one)"


def _check_host(host: str) -> None:
    """Refuse to let strangers run commands: whoever reaches the API can."""
    if host in LOCAL_HOSTS or os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        return
    raise ConfigError(
        f"host is {host!r}: whoever reaches this port can run commands on this machine. "
        "Set PREFECT_SERVER_API_AUTH_STRING and PREFECT_API_AUTH_STRING to the same user:password (and put a "
        "TLS proxy before it), or keep 127.0.0.1 and reach it with `ssh -L 4200:127.0.0.1:4200`."
    )


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, and name one that is free."""
    problem = _bind_problem(host, port)
    if problem is None:
        return
    if problem.errno == errno.EACCES:
        raise ConfigError(
            f"port {port} is reserved for the system; try `tandem up --port 4200`."
        ) from problem
    if problem.errno != errno.EADDRINUSE:
        raise ConfigError(f"Cannot listen on {host}:{port}: {problem}; try `--host 127.0.0.1`.") from problem
    free = next((p for p in range(port + 1, min(port + 100, 65536)) if _bind_problem(host, p) is None), 0)
    advice = f"try `tandem up --port {free}`" if free else "give another one with `--port`"
    raise ConfigError(f"port {port} on {host} is in use by another program; {advice}.") from problem


def _bind_problem(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


@contextmanager
def _signals_to(request_stop: Callable[[], None]) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request.

    A handler that raised could do so between the start of a process and the moment we know of it.
    """

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        request_stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
