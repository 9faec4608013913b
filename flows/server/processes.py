"""Child processes that end when told to, with everything they started themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


class Child:
    """One process of ours, its output in a log file, in a session of its own.

    The session keeps Ctrl-C in the terminal away from it: the launcher stops its children in an order that
    lets each finish what it does.
    """

    def __init__(self, name: str, module: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own modules, no shell
                [sys.executable, "-m", *module],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def log_tail(self, lines: int = 15) -> str:
        """The end of what it printed."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def stop(self, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM, then SIGKILL to what is left of its tree after ``grace_s`` seconds, or once ``hurry``."""
        if self.exit_code is not None:
            return
        tree = process_tree(self.pid)
        self.process.terminate()
        deadline = time.monotonic() + grace_s
        while self.exit_code is None and time.monotonic() < deadline and not hurry():
            time.sleep(0.05)
        tree += process_tree(self.pid)
        if self.exit_code is None:
            self.process.kill()
            self.process.wait()
        kill(tree)


def process_tree(pid: int) -> list[psutil.Process]:
    """A process's children, grandchildren and so on, as far as they are alive; not itself."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def terminate(processes: Iterable[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """Ask processes to end and wait for them; returns those that are alive after ``grace_s`` seconds.

    Unlike ``psutil.wait_procs`` it takes a process that its parent has not reaped yet for ended.
    """
    waiting = [process for process in processes if is_alive(process)]
    for process in waiting:
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + grace_s
    while waiting and time.monotonic() < deadline:
        time.sleep(0.05)
        waiting = [process for process in waiting if is_alive(process)]
    return waiting


def kill(processes: Iterable[psutil.Process], wait_s: float = 5.0) -> None:
    """End processes at once and wait until they have; those that had ended already are fine."""
    waiting = [process for process in processes if process.pid != os.getpid() and is_alive(process)]
    for process in waiting:
        with suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + wait_s  # one that hangs in the kernel may take longer than anybody waits
    while any(is_alive(process) for process in waiting) and time.monotonic() < deadline:
        time.sleep(0.02)


def end_children(grace_s: float) -> None:
    """Ask our own children to end, with time to say so, and kill what is left of them and below them."""
    everything = process_tree(os.getpid())
    kill(terminate(psutil.Process().children(), grace_s))
    kill(everything)
