"""Several processes that work together: what arrives from them, and that none is left."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from features.errors import EncoderError
from pipeline.progress import Progress, SilentReporter
from pipeline.together import work_together
from recommenders.errors import TrainingError
from tests.pipeline import together_shell as shell

REPOSITORY = Path(__file__).resolve().parents[2]


class Listening(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def say(self, message: str) -> None:
        self.told.append(message)

    @contextmanager
    def progress(self, description: str) -> Iterator[Progress]:
        self.told.append(f"open {description}")
        yield lambda done, total: self.told.append((done, total))
        self.told.append(f"close {description}")


class Interrupting(SilentReporter):
    """Ctrl-C as soon as there is something to read."""

    def say(self, message: str) -> None:
        raise KeyboardInterrupt


def test_what_process_0_says_is_shown() -> None:
    listening = Listening()
    work_together(shell.report, 2, listening)
    assert listening.told == ["0 of 2", "open counting", (1, 2), "close counting"]
    assert not multiprocessing.active_children()


def test_a_users_mistake_arrives_as_that() -> None:
    with pytest.raises(EncoderError, match=r"^no such encoder; choose another\.$") as caught:
        work_together(shell.err_for_a_user, 2)
    assert caught.value.__cause__ is None  # no stack trace of another process
    assert not multiprocessing.active_children()


def test_any_other_error_arrives_with_its_stack() -> None:
    with pytest.raises(Exception, match="this and that") as caught:
        work_together(shell.err_oddly, 2)
    assert "OddError" in str(caught.value.__cause__)
    assert "err_oddly" in str(caught.value.__cause__)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_named_rather_than_those_that_miss_it() -> None:
    with pytest.raises(TrainingError, match=r"Process 1 of the 2 .* was killed \(SIGKILL\)"):
        work_together(shell.fail_for_want_of_another, 2)
    assert not multiprocessing.active_children()


def test_an_interruption_stops_all() -> None:
    with pytest.raises(KeyboardInterrupt):
        work_together(shell.wait_after_saying, 2, Interrupting())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.pipeline.together_shell"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("pids")
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
        process.send_signal(number)
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
