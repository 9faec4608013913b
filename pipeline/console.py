"""The manners of the command line: tables for people, ``--json`` for programs, one message for a mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import USER_ERRORS
from pipeline.progress import SILENT, Reporter, RichReporter

if TYPE_CHECKING:
    from pipeline.store import Store

DEFAULT_STORE = ".tandem"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="TANDEM_STORE",
        help="Where artefacts are kept: a folder or an fsspec URL.",
        show_default=True,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document for programs instead of text.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting, e.g. --set training.epochs=20. Repeatable."
    ),
]
NameOption = Annotated[
    str, typer.Option(help="Keep the artefact under this name, for later commands and from `gc`.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Make the artefact again although the store has it.")
]

LESS_AT_A_TIME = (
    "What was whole is kept. Lower what this part holds at once and run the command again: "
    "extraction.batch_size, extraction.memory_mb; training.batch_size, evaluation.block_mb; "
    "finetuning.chunk_size, finetuning.activations_mb; live.chunk, live.activations_mb; "
    "index.memory_budget_mb."
)
"""What to do where memory does not suffice."""


class Output:
    """Where one command's answer goes."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # Piped to a file or a pager there is no width to fit: a wrapped reference could not be copied.
        self.console = Console() if sys.stdout.isatty() else Console(width=200)
        self.reporter: Reporter = SILENT if as_json else RichReporter(Console(stderr=True))

    def show(self, document: Mapping[str, Any] | Sequence[Any], text: str | Table | None = None) -> None:
        """Print the document as JSON for a program, else the text (or the document's pairs) for a person."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()
        elif isinstance(text, Table):
            self.console.print(text)
        elif text is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif isinstance(document, Mapping):
            for key, value in document.items():
                self.console.print(f"{key:<24} {value}", markup=False, highlight=False, soft_wrap=True)
        else:
            for row in document:
                self.console.print(str(row), markup=False, highlight=False, soft_wrap=True)


def open_store(url: str, out: Output) -> Store:
    """Open the store a command was given; what it has to say appears above any progress bar."""
    from pipeline.store import Store

    return Store(url, say=out.reporter.say)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Make a plain table that fits a terminal."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=number < len(columns) - 1)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def human_bytes(n_bytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def run_app(app: Callable[..., Any], arguments: Sequence[str] | None = None) -> int:
    """Run a command and turn mistakes into one message and an exit code.

    Returns:
        0; 2 for a user's mistake and where memory does not suffice; 130 after Ctrl-C; what the command chose
        otherwise.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, prog_name="tandem")
    except USER_ERRORS as error:
        return _fail(str(error), arguments)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0] or type(error).__name__
        return _fail(f"out of memory: {first_line.rstrip('.')}. {LESS_AT_A_TIME}", arguments)
    except SystemExit as stop:  # how typer ends every command
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return _interrupted() if code == EXIT_INTERRUPTED else code
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether Python, numpy or torch got no memory; torch has a class of its own for GPUs only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _fail(message: str, arguments: Sequence[str]) -> int:
    if "--json" in arguments:
        sys.stdout.write(json.dumps({"error": message}, ensure_ascii=False) + "\n")
    Console(stderr=True).print(
        f"tandem: {message}", markup=False, highlight=False, soft_wrap=True, style="red"
    )
    return EXIT_USER_ERROR


def _interrupted() -> int:
    Console(stderr=True).print(
        "tandem: stopped. What was whole is kept; the same command goes on from there."
    )
    return EXIT_INTERRUPTED
