"""Arrays with a row for each item that has one, in a folder: written in any order, read by item row."""

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue
from torch import Tensor

from features.errors import FeatureFileError

PLACES = "places.npy"
_WRITTEN = ".written.npz"
"""Which rows are on the disk for certain; hidden, as nobody needs it once the files are whole."""
_MARK_EVERY_S = 30.0
Rows = npt.NDArray[np.int64]


class RowReader:
    """What `RowWriter` wrote.

    Args:
        folder: Where it lies.
        head_file: Name of the head, without which the folder is not whole.
        names: Of the arrays.

    Raises:
        FeatureFileError: Something is not there, not whole, or does not fit together.
    """

    def __init__(self, folder: Path, head_file: str, names: Sequence[str]) -> None:
        try:
            head = json.loads((folder / head_file).read_text(encoding="utf-8"))
            places, *arrays = (np.load(folder / name, mmap_mode="r") for name in (PLACES, *names))
        except (OSError, ValueError) as error:
            raise FeatureFileError(
                f"{folder.name} holds no whole states ({error}); make them anew."
            ) from error
        self.head: dict[str, Any] = head if isinstance(head, dict) else {}
        self.arrays: list[npt.NDArray[Any]] = arrays
        self._places = np.asarray(places)
        lengths = [len(array) for array in arrays]
        fits = self._places.ndim == 1 and self._places.dtype == np.int64 and len(set(lengths)) == 1
        if not fits or self._places.max(initial=-1) >= lengths[0]:
            raise FeatureFileError(
                f"{folder.name} holds arrays of {lengths} rows for places {self._places.shape} up to "
                f"{self._places.max(initial=-1)}; expected equal numbers, above every place; make them anew."
            )
        self._name = folder.name

    def __len__(self) -> int:
        """I, items that have a row and items that have none."""
        return len(self._places)

    def missing(self, rows: Tensor) -> list[int]:
        """Which of some (R,) item rows have none here."""
        wanted = rows.cpu().numpy()
        lost: list[int] = wanted[self._places[wanted] < 0].tolist()
        return lost

    def first(self) -> int:
        """An item row that has one here.

        Raises:
            FeatureFileError: No item has.
        """
        held = np.flatnonzero(self._places >= 0)
        if not len(held):
            raise FeatureFileError(f"{self._name} holds no state of any item.")
        return int(held[0])

    def places(self, rows: Tensor) -> Rows:
        """(R,) item rows -> where they stand in the arrays.

        Raises:
            FeatureFileError: One has no row; nothing is guessed in its place.
        """
        lost = self.missing(rows)
        if lost:
            raise FeatureFileError(
                f"{self._name} holds no state of item row {lost[0]} ({len(lost)} of {len(rows)} asked for "
                "have none); make them anew, or leave these items out."
            )
        places: Rows = self._places[rows.cpu().numpy()]
        return places

    def spread(self, values: Rows) -> Rows:
        """(R,) numbers, one for each row of the arrays -> (I,) by item; 0 where an item has no row."""
        found = np.zeros(len(self), dtype=np.int64)
        has = self._places >= 0
        found[has] = values[self._places[has]]
        return found


class RowWriter:
    """Writes arrays of a folder batch by batch; rows never written count as not there.

    Args:
        folder: New, or of an earlier try.
        head_file: Written last.
        n_items: I.
        rows: The item rows that will come; None for all. Each has its place on the disk from the start.
        resume: Keep what an earlier try of the very same states has written, instead of starting anew.
    """

    def __init__(
        self, folder: Path, head_file: str, n_items: int, rows: Tensor | None = None, *, resume: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / head_file).unlink(missing_ok=True)
        self.folder, self._head_file = folder, head_file
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        wanted = np.arange(n_items) if rows is None else np.sort(rows.cpu().numpy())
        self._places = np.full(n_items, -1, dtype=np.int64)
        self._places[wanted] = np.arange(len(wanted))
        self._n_rows = len(wanted)
        self._written = np.zeros(n_items, dtype=bool)
        self._marked_at = time.monotonic()
        if resume:
            self._take_up()
        else:
            (folder / _WRITTEN).unlink(missing_ok=True)

    def has(self, rows: Tensor) -> bool:
        """Whether all of some rows are written."""
        return bool(self._written[rows.cpu().numpy()].all())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of an array; () where nothing is written yet."""
        array = self._arrays.get(name)
        return () if array is None else tuple(array.shape[1:])

    def write(self, rows: Tensor, arrays: Mapping[str, Tensor]) -> None:
        """Write (R,) rows of every array, (R, ...) each, in the types they have.

        Raises:
            OSError: The disk is full; the space of all rows is taken at the first of them.
        """
        item_rows = rows.cpu().numpy()
        for name, tensor in arrays.items():
            values = tensor.cpu().numpy()
            if name not in self._arrays:
                self._arrays[name] = self._make(name, values)
            self._arrays[name][self._places[item_rows]] = values
        self._written[item_rows] = True
        if time.monotonic() - self._marked_at > _MARK_EVERY_S:
            self._mark()

    def finish(self, head: Mapping[str, JsonValue]) -> None:
        """Close the files; the head is written last, so that a folder without one is not whole.

        Raises:
            FeatureFileError: No row was written at all.
        """
        if not self._arrays:
            raise FeatureFileError(
                "no item has a state to keep: none has the modality, or none could be read; look at the "
                "files, or keep no states (live.keep_states: false)."
            )
        self._mark()
        self._arrays = {}
        np.save(self.folder / PLACES, np.where(self._written, self._places, -1))
        (self.folder / self._head_file).write_text(json.dumps(dict(head)) + "\n", encoding="utf-8")

    def _make(self, name: str, values: npt.NDArray[Any]) -> np.memmap[Any, Any]:
        path = self.folder / name
        shape = (self._n_rows, *values.shape[1:])
        array = np.lib.format.open_memmap(path, "w+", dtype=values.dtype, shape=shape)
        _take_space(path)
        return array

    def _mark(self) -> None:
        """Say what is on the disk, after it is there."""
        for array in self._arrays.values():
            array.flush()
        fresh = self.folder / f"{_WRITTEN}.tmp"
        with fresh.open("wb") as file:
            np.savez(file, rows=self._written, names=np.array(sorted(self._arrays)))
        fresh.replace(self.folder / _WRITTEN)
        self._marked_at = time.monotonic()

    def _take_up(self) -> None:
        """Open what an earlier try has marked as written; where that does not fit, start anew."""
        try:
            with np.load(self.folder / _WRITTEN) as mark:
                written, names = mark["rows"], mark["names"].tolist()
            found = {name: np.lib.format.open_memmap(self.folder / name, "r+") for name in names}
        except (OSError, ValueError, KeyError, BadZipFile):
            return
        if written.shape == self._written.shape and all(len(each) == self._n_rows for each in found.values()):
            self._arrays, self._written = found, written


def _take_space(path: Path) -> None:
    """Have a sparse file's space now: a full disk would otherwise end the process at some later row.

    Raises:
        OSError: The disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:  # some file systems know no such request
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
