"""Pieces of work for several processes, and a program that waits for two: together_shell.py."""

from __future__ import annotations

import os
import signal
import time

from features.errors import EncoderError
from pipeline.progress import Reporter, SilentReporter
from pipeline.together import Place, work_together


def report(place: Place, reporter: Reporter) -> None:
    """Say and show something."""
    reporter.say(f"{place.rank} of {place.n_processes}")
    with reporter.progress("counting") as progress:
        progress(1, 2)


def wait_after_saying(place: Place, reporter: Reporter) -> None:
    """Say which process this is, and wait to be stopped."""
    reporter.say(f"pids {os.getpid()} {os.getppid()} {place.n_threads}")
    time.sleep(600)


def err_for_a_user(place: Place, reporter: Reporter) -> None:
    """Process 1 finds a user's mistake while the other waits."""
    if place.rank == 1:
        raise EncoderError("no such encoder; choose another.")
    wait_after_saying(place, reporter)


class OddError(Exception):
    """One that cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def err_oddly(place: Place, reporter: Reporter) -> None:
    """Process 0 fails in a way nobody foresaw."""
    if place.rank == 0:
        raise OddError("this", "that")
    wait_after_saying(place, reporter)


def fail_for_want_of_another(place: Place, reporter: Reporter) -> None:
    """Process 0 tells of a lost connection before process 1, which is killed, is seen to have ended."""
    if place.rank == 0:
        raise RuntimeError("Connection closed by peer")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


class Printing(SilentReporter):
    """Says its lines on standard output."""

    def say(self, message: str) -> None:
        """Print."""
        print(message, flush=True)  # noqa: T201


if __name__ == "__main__":
    work_together(wait_after_saying, 2, Printing())
