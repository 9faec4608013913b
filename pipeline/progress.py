"""How a stage tells how far it is: bars in a terminal, artifacts in Prefect, nothing for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""Called with (done, total) as work advances; ``total`` may be 0 while it is unknown."""


class Reporter(Protocol):
    """Where a stage's words and progress go."""

    def say(self, message: str) -> None:
        """Tell one line, whole."""
        ...

    def progress(self, description: str) -> AbstractContextManager[Progress]:
        """Open a progress line; use as a context manager whose value is a ``Progress`` callable."""
        ...


class SilentReporter:
    """Says nothing: for programs (``--json``) and for tests."""

    def say(self, message: str) -> None:
        """Drop the message."""

    @contextmanager
    def progress(self, description: str) -> Iterator[Progress]:  # noqa: ARG002 - the protocol's name
        """Hand out a callable that does nothing."""
        yield _ignore


def _ignore(done: int, total: int) -> None:
    """Drop the figures."""


class RichReporter:
    """Progress bars and lines on a terminal; one line per finished task where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        """Print the message above any bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str) -> Iterator[Progress]:
        """Show a bar with rate and remaining time; it disappears when the task ends."""
        from rich.progress import (  # noqa: PLC0415 - a quiet command must not pay for it
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)


SILENT = SilentReporter()
