"""From encoded contents to whole parts: which row is whose, what is known already, what a killed run left."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from features.catalogue import Contents
from features.errors import FeatureFileError
from features.known import KnownVectors
from features.loading import Source
from features.parts import PartFile, PartRows, Status, Vectors, part_name, write_part

Places = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Plan:
    """Which content each row has and which part encodes it.

    Contents are numbered by first appearance, so that those a part encodes are neighbours: a content belongs
    to the part of the first row that has it. That depends on the catalogue alone, never on what is on disk
    already; so batches, and with them every bit of the result, are the same after a kill.
    """

    contents: Contents
    rows_per_part: int
    content_of_row: Places
    """(I,) number of the row's content; -1 where there is none."""
    rows_of_content: list[list[int]]
    """Rows that have a content, in order."""
    first_content: list[int]
    """Number of the first content of each part, and at the end the number of contents."""
    known: Places
    """(C,) place among the known vectors; -1 for what has to be encoded."""

    @classmethod
    def make(cls, contents: Contents, rows_per_part: int, known: KnownVectors | None) -> "Plan":
        """Number the contents of a catalogue."""
        numbers: dict[str, int] = {}
        rows_of_content: list[list[int]] = []
        content_of_row = np.full(len(contents), -1, np.int64)
        first_content = []
        for row, content_hash in enumerate(contents.hashes):
            if row % rows_per_part == 0:
                first_content.append(len(numbers))
            if content_hash is None:
                continue
            number = numbers.setdefault(content_hash, len(numbers))
            if number == len(rows_of_content):
                rows_of_content.append([])
            rows_of_content[number].append(row)
            content_of_row[row] = number
        first_content = [
            *(first_content or [0]),
            len(numbers),
        ]  # no rows still make a part: it says D and type
        places = known.find(list(numbers)) if known is not None else np.full(len(numbers), -1, np.int64)
        return cls(contents, rows_per_part, content_of_row, rows_of_content, first_content, places)

    @property
    def n_parts(self) -> int:
        """Parts of the whole feature set."""
        return len(self.first_content) - 1

    def rows(self, part: int) -> range:
        """Rows of a part."""
        start = part * self.rows_per_part
        return range(start, min(start + self.rows_per_part, len(self.contents)))

    def contents_of(self, part: int) -> range:
        """Contents that a part is the first to have."""
        return range(self.first_content[part], self.first_content[part + 1])

    def to_encode(self, part: int) -> list[int]:
        """Contents that a part has to encode."""
        return [content for content in self.contents_of(part) if self.known[content] < 0]

    def source(self, content: int) -> Source:
        """Where a content comes from; its picture may lie at several places."""
        rows = self.rows_of_content[content]
        columns = self.contents
        paths = dict.fromkeys(columns.images[row] or "" for row in rows)
        first = rows[0]
        return Source(
            tuple(path for path in paths if path),
            columns.image_hashes[first] or "",
            columns.texts[first] or "",
        )

    def is_needed_after(self, content: int, part: int) -> bool:
        """Whether a row of a later part has the content too."""
        return self.rows_of_content[content][-1] >= self.rows(part).stop


class BackgroundWriter:
    """Writes parts in a thread of its own, two at most waiting, in the order they are handed over.

    An error of the disk surfaces at the next `write` or on exit.

    Args:
        write_one: Writes the part of a number, in that thread.
    """

    def __init__(self, write_one: Callable[[int, PartRows], None]) -> None:
        self._write_one = write_one
        self._queue: queue.Queue[tuple[int, PartRows] | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="part-writer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def write(self, number: int, rows: PartRows) -> None:
        """Hand a part over; waits while two others are waiting."""
        self._raise_error()
        self._queue.put((number, rows))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write_one(*item)
                except BaseException as error:  # noqa: BLE001 - handed to the main thread
                    self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)  # parts handed over are whole, and are written even if the run ends here
        self._thread.join()
        if error is None:
            self._raise_error()


class PartWriter(BackgroundWriter):
    """Writes the parts of a feature set into its folder."""

    def __init__(self, folder: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(lambda number, rows: write_part(folder / part_name(number), rows, metadata))


class Assembler:
    """Collects vectors until a part is whole, then hands it to the writer; parts leave in order.

    Args:
        plan: Which rows have which content.
        empty: (0, D) of the stored type; says what vectors look like.
        known: Vectors of contents that need no encoding.
        write: Takes whole parts.
        progress: Is told the rows done and the rows in all.
    """

    def __init__(
        self,
        plan: Plan,
        empty: Vectors,
        known: KnownVectors | None,
        write: Callable[[int, PartRows], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._plan = plan
        self._todo: deque[int] = deque()
        self._outstanding: dict[int, int] = {}  # contents that a part still waits for
        self._empty = empty
        self._known = known
        self._write = write
        self._progress = progress
        self._open: dict[
            int, Vectors
        ] = {}  # vectors of the part that is next to leave, and of those behind it
        self._later: dict[int, Vectors] = {}  # vectors of parts that have left, for rows still to come
        self._failures: dict[int, str] = {}
        self._done_rows = 0
        self.statuses: Counter[Status] = Counter()
        self.reasons: Counter[str] = Counter()

    def expect(self, part: int) -> None:
        """Wait for the contents of a part; parts are expected in order."""
        self._todo.append(part)
        self._outstanding[part] = len(self._plan.to_encode(part))

    def keep(self, part: int, rows: PartRows) -> None:
        """Count a part that is on disk already, and take over what later parts need of it."""
        self._count(rows)
        self._done_rows += len(rows)
        start = self._plan.rows(part).start
        for content in self._plan.contents_of(part):
            if self._plan.is_needed_after(content, part):
                position = self._plan.rows_of_content[content][0] - start
                if rows.statuses[position] == "ok":
                    self._later[content] = rows.vectors[position].copy()
                else:
                    self._failures[content] = rows.reasons[position] or ""

    def add(self, part: int, contents: Sequence[int], vectors: Vectors) -> None:
        """Take over what was encoded, (N, D)."""
        self._open.update(zip(contents, vectors, strict=True))
        self._outstanding[part] -= len(contents)
        self.finish()

    def fail(self, part: int, failures: Mapping[int, str]) -> None:
        """Note contents that could not be read, and why."""
        self._failures.update(failures)
        self._outstanding[part] -= len(failures)

    def finish(self) -> None:
        """Hand over the parts that are whole."""
        while self._todo and self._outstanding[self._todo[0]] == 0:
            part = self._todo.popleft()
            rows = self._assemble(part)
            self._count(rows)
            self._done_rows += len(rows)
            self._write(part, rows)
        if self._progress is not None:
            self._progress(self._done_rows + len(self._open), len(self._plan.contents))

    def _assemble(self, part: int) -> PartRows:
        """The rows of a part all of whose contents were added, failed or are known."""
        plan = self._plan
        mine = plan.contents_of(part)
        vector_of = {content: self._open.pop(content) for content in mine if content in self._open}
        places = [content for content in mine if plan.known[content] >= 0]
        if places and self._known is not None:
            vector_of.update(zip(places, self._known.take(plan.known[places]), strict=True))
        rows = plan.rows(part)
        vectors = np.zeros((len(rows), self._empty.shape[1]), self._empty.dtype)
        statuses: list[Status] = []
        reasons: list[str | None] = []
        for position, row in enumerate(rows):
            content = int(plan.content_of_row[row])
            vector = vector_of.get(content, self._later.get(content))
            if vector is not None:
                vectors[position] = vector
            is_missing = plan.contents.presence[row] == "missing"
            statuses.append("ok" if vector is not None else "missing" if is_missing else "unreadable")
            reasons.append(self._failures.get(content, plan.contents.reasons[row]))
            if content >= 0 and not plan.is_needed_after(content, part):
                self._later.pop(content, None)
        for content, vector in vector_of.items():
            if plan.is_needed_after(content, part):
                self._later[content] = vector.copy()  # a view would hold its whole batch
        return PartRows(*expected_columns(plan, part), statuses, reasons, vectors)

    def _count(self, rows: PartRows) -> None:
        self.statuses.update(rows.statuses)
        self.reasons.update(reason for reason in rows.reasons if reason)


def expected_columns(plan: Plan, part: int) -> tuple[list[str], list[str | None]]:
    """Ids and hashes that a part must have."""
    rows = plan.rows(part)
    window = slice(rows.start, rows.stop)
    return plan.contents.item_ids[window], plan.contents.hashes[window]


def whole_part(path: Path, plan: Plan, part: int, metadata: Mapping[str, str]) -> PartRows | str:
    """What an earlier run left of a part, or why it must be made again ("" if it is simply not there)."""
    if not path.exists():
        return ""
    try:
        with PartFile(path, verify=True) as file:
            if any(file.metadata.get(name) != value for name, value in metadata.items()):
                return f"{path.name} was left by an extraction with other settings; it is encoded again"
            rows = file.rows()
    except FeatureFileError:
        return f"{path.name} is damaged; its {len(plan.rows(part))} rows are encoded again"
    if (list(rows.item_ids), list(rows.content_hashes)) != expected_columns(plan, part):
        return f"{path.name} holds other items; it is encoded again"
    return rows
