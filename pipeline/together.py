"""Several processes of this machine that do one piece of work together, and end together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from typing_extensions import override

from pipeline.errors import USER_ERRORS
from pipeline.progress import SILENT, Progress, Reporter
from recommenders.errors import TrainingError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

GRACE_S = 5.0
"""What a process gets to end after SIGTERM, before SIGKILL."""
SECOND_THOUGHTS_S = 2.0
"""When one process fails for want of another, the other's own end may be seen a little later."""


@dataclass(frozen=True)
class Place:
    """Which of the processes one is."""

    rank: int
    """From 0; what process 0 says is shown."""
    n_processes: int
    n_threads: int
    """Of torch, in each process."""


Work = Callable[[Place, Reporter], None]
"""What each process does; it is pickled: a function of a module, or an object with ``__call__``."""


# What a process tells the one that started it. Each is small, and sent as it comes.
@dataclass(frozen=True)
class _Said:
    message: str


@dataclass(frozen=True)
class _Opened:
    line: int
    description: str


@dataclass(frozen=True)
class _Advanced:
    line: int
    done: int
    total: int


@dataclass(frozen=True)
class _Closed:
    line: int


@dataclass(frozen=True)
class _Failed:
    error: Exception
    trace: str


@dataclass(frozen=True)
class _Done:
    pass


class _RemoteTraceback(Exception):  # noqa: N818 - no error of its own: it shows where another was raised
    """The stack of an error in another process, shown as its cause."""

    def __init__(self, trace: str) -> None:
        super().__init__(trace)
        self.trace = trace

    @override
    def __str__(self) -> str:
        return f"\n{self.trace}"


def work_together(work: Work, n_processes: int, reporter: Reporter = SILENT) -> None:
    """Run one piece of work in several new processes, and return when all are done.

    The processes are started anew, not forked: neither torch's threads nor a GPU survive a fork. They end
    with this one, however it ends.

    Args:
        work: What each does.
        n_processes: How many.
        reporter: Shows words and progress of process 0.

    Raises:
        TrainingError: A process was killed or ended by itself.
        Exception: What a process raised, as the same kind of error; the others are stopped before.
    """
    context = multiprocessing.get_context("spawn")
    n_threads = max(1, torch.get_num_threads() // n_processes)
    team = _Team([], [])
    try:
        for rank in range(n_processes):
            ours, theirs = context.Pipe()
            place = Place(rank, n_processes, n_threads)
            process = context.Process(target=_run, args=(work, place, theirs), name=f"worker-{rank}")
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            team.add(process, ours)
        with ExitStack() as lines:
            team.listen(reporter, lines)
    finally:
        team.stop()


class _Team:
    """The processes and the connections to them, by rank."""

    def __init__(self, processes: list[SpawnProcess], connections: list[Connection[Any, Any]]) -> None:
        self._processes, self._connections = processes, connections
        self._done: set[int] = set()

    def add(self, process: SpawnProcess, connection: Connection[Any, Any]) -> None:
        """Take in one that was started."""
        self._processes.append(process)
        self._connections.append(connection)

    def listen(self, reporter: Reporter, lines: ExitStack) -> None:
        """Show what process 0 says until all are done; raise what one of them raised."""
        screen = _Screen(reporter, lines)
        while len(self._done) < len(self._processes):
            for message in self._next():
                if isinstance(message, _Failed):
                    self._raise(message)
                screen.show(message)

    def _next(self, timeout_s: float | None = None) -> Iterator[object]:
        """Give what has come from the processes that are not done; raise if one of them has ended."""
        waited_for = {self._connections[rank]: rank for rank in self._open()}
        for ready in wait(list(waited_for), timeout_s):
            assert isinstance(ready, Connection)  # noqa: S101 - nothing else was waited for
            rank = waited_for[ready]
            try:
                message = ready.recv()
            except (EOFError, OSError):
                self._raise_ended(rank)
            if isinstance(message, _Done):
                self._done.add(rank)
            yield message

    def _open(self) -> list[int]:
        return [rank for rank in range(len(self._processes)) if rank not in self._done]

    def _raise(self, failed: _Failed) -> NoReturn:
        """Raise the error that was first: when one process fails, the others fail for want of it."""
        until = time.monotonic() + SECOND_THOUGHTS_S
        while not isinstance(failed.error, USER_ERRORS) and (left := until - time.monotonic()) > 0:
            for message in self._next(left):  # raises if a process has ended
                if isinstance(message, _Failed) and isinstance(message.error, USER_ERRORS):
                    failed = message
        if isinstance(failed.error, USER_ERRORS):
            raise failed.error
        raise failed.error from _RemoteTraceback(failed.trace)

    def _raise_ended(self, rank: int) -> NoReturn:
        process = self._processes[rank]
        process.join(GRACE_S)
        raise TrainingError(
            f"Process {rank} of the {len(self._processes)} that work together {_how(process.exitcode)}; the "
            "others were stopped. If memory ran out, set fewer processes, or a smaller live.chunk or "
            "live.activations_mb. The same command goes on from the last whole epoch."
        )

    def stop(self) -> None:
        """End all that still run, and wait for that."""
        for rank, process in enumerate(self._processes):
            if rank in self._done:
                process.join(GRACE_S)
            if process.is_alive():
                process.terminate()
        until = time.monotonic() + GRACE_S
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()


class _Screen:
    """Shows one process's words and progress lines through this process's reporter."""

    def __init__(self, reporter: Reporter, lines: ExitStack) -> None:
        self._reporter, self._stack = reporter, lines
        self._lines: dict[int, tuple[ExitStack, Progress]] = {}

    def show(self, message: object) -> None:
        """Pass on one message; other processes than 0 send none that is shown."""
        match message:
            case _Said(words):
                self._reporter.say(words)
            case _Opened(line, description):
                opened = self._stack.enter_context(ExitStack())
                self._lines[line] = (opened, opened.enter_context(self._reporter.progress(description)))
            case _Advanced(line, done, total):
                self._lines[line][1](done, total)
            case _Closed(line):
                self._lines.pop(line)[0].close()


def _how(exit_code: int | None) -> str:
    """Say how a process ended."""
    if exit_code is None:
        return "closed its connection"
    if exit_code < 0:
        return f"was killed ({signal.Signals(-exit_code).name})"
    return f"ended by itself with status {exit_code}"


# -- in the processes that are started -------------------------------------------------------------


def _run(work: Work, place: Place, connection: Connection[Any, Any]) -> None:
    """Work, and tell how it went; an error is told before this process leaves the others alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started us stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(place.n_threads)  # accelerate chooses for itself where it is not set
    torch.set_num_threads(place.n_threads)
    try:
        work(place, _Relay(connection) if place.rank == 0 else SILENT)
    except Exception as error:  # noqa: BLE001 - raised again where somebody sees it
        connection.send(_Failed(_portable(error), traceback.format_exc()))
        threading.Event().wait()  # to be stopped: ending now would look like the others' fault to them
    connection.send(_Done())


def _end_with_parent() -> None:
    parent: BaseProcess | None = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return the error, or what can be sent of it: the nearest kind that is made of a message."""
    for kind in type(error).__mro__:
        try:
            sent = error if kind is type(error) else kind(str(error))
            pickle.loads(pickle.dumps(sent))  # noqa: S301 - our own
        except Exception:  # noqa: BLE001, S112 - whatever a class's pickling may raise
            continue
        if isinstance(sent, Exception):
            return sent
    return RuntimeError(str(error))


class _Relay:
    """A reporter whose words and progress are shown by the process that started this one."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # threads that decode pictures report, too
        self._n_lines = 0

    def say(self, message: str) -> None:
        """Have one line told."""
        self._send(_Said(message))

    def progress(self, description: str) -> AbstractContextManager[Progress]:
        """Have a progress line opened."""
        return self._line(description)

    @contextmanager
    def _line(self, description: str) -> Iterator[Progress]:
        self._n_lines += 1
        line = self._n_lines
        self._send(_Opened(line, description))
        yield lambda done, total: self._send(_Advanced(line, done, total))
        self._send(_Closed(line))

    def _send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)
