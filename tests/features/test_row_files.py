"""Rows of items in files: read as written, by item, and a folder that is not whole is refused."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.errors import FeatureFileError
from features.live import row_files
from features.live.row_files import PLACES, RowReader, RowWriter

HEAD = "head.json"
ROWS = torch.tensor([6, 1, 4])
NUMBERS = torch.arange(24, dtype=torch.float32).reshape(8, 3)


def writer(folder: Path, *, rows: Tensor | None = ROWS, resume: bool = False) -> RowWriter:
    return RowWriter(folder, HEAD, 8, rows, resume=resume)


def put(into: RowWriter, *rows: int) -> None:
    wanted = torch.tensor(rows)
    into.write(wanted, {"a.npy": NUMBERS[wanted], "b.npy": wanted})


def test_rows_come_back_by_item_whatever_order_they_were_written_in(tmp_path: Path) -> None:
    into = writer(tmp_path)
    put(into, 6)
    put(into, 4, 1)
    into.finish({"what": "numbers"})
    read = RowReader(tmp_path, HEAD, ("a.npy", "b.npy"))
    assert read.head == {"what": "numbers"}
    assert (len(read), len(read.arrays[0]), read.first()) == (8, 3, 1)
    for rows in ([1, 4, 6], [6, 6, 1], []):
        wanted = torch.tensor(rows, dtype=torch.int64)
        places = read.places(wanted)
        assert read.arrays[0][places].tolist() == NUMBERS[wanted].tolist()
        assert read.arrays[1][places].tolist() == rows
    assert read.spread(np.array([5, 6, 7])).tolist() == [0, 5, 0, 0, 6, 0, 7, 0]
    assert read.missing(torch.tensor([0, 1, 7])) == [0, 7]
    with pytest.raises(FeatureFileError, match=r"no state of item row 0 \(2 of 3 asked for have none\)"):
        read.places(torch.tensor([0, 1, 7]))


def test_a_row_that_never_came_is_not_there(tmp_path: Path) -> None:
    into = writer(tmp_path)
    put(into, 4, 1)
    into.finish({})
    assert RowReader(tmp_path, HEAD, ("a.npy",)).missing(ROWS) == [6]
    with pytest.raises(FeatureFileError, match="no item has a state to keep"):
        writer(tmp_path).finish({})


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    into = writer(tmp_path)
    put(into, 1, 4, 6)
    with pytest.raises(FeatureFileError, match="holds no whole states"):
        RowReader(tmp_path, HEAD, ("a.npy",))
    into.finish({})
    RowReader(tmp_path, HEAD, ("a.npy", "b.npy"))
    np.save(tmp_path / "b.npy", np.zeros(2))
    with pytest.raises(FeatureFileError, match=r"arrays of \[3, 2\] rows for places"):
        RowReader(tmp_path, HEAD, ("a.npy", "b.npy"))
    np.save(tmp_path / PLACES, np.array([0, 5]))
    with pytest.raises(FeatureFileError, match="up to 5; expected equal numbers, above every place"):
        RowReader(tmp_path, HEAD, ("a.npy",))
    writer(tmp_path)  # begins anew
    with pytest.raises(FeatureFileError, match="holds no whole states"):
        RowReader(tmp_path, HEAD, ("a.npy",))


def test_what_is_marked_as_written_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_MARK_EVERY_S", 0.0)
    put(writer(tmp_path), 6)
    again = writer(tmp_path, resume=True)
    assert again.has(torch.tensor([6]))
    assert not again.has(ROWS)
    assert again.shape("a.npy") == (3,)
    put(again, 1, 4)
    again.finish({})
    read = RowReader(tmp_path, HEAD, ("a.npy",))
    assert read.arrays[0][read.places(ROWS)].tolist() == NUMBERS[ROWS].tolist()
    assert not writer(tmp_path, resume=False).has(torch.tensor([6]))


@pytest.mark.parametrize(
    "change", ["other rows", "a file gone", "a file of others", "no mark", "half a mark"]
)
def test_what_does_not_fit_is_made_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_MARK_EVERY_S", 0.0)
    put(writer(tmp_path), 6, 4)
    mark = tmp_path / ".written.npz"
    if change == "a file gone":
        (tmp_path / "b.npy").unlink()
    elif change == "a file of others":
        np.save(tmp_path / "b.npy", np.zeros(2))
    elif change == "no mark":
        mark.unlink()
    elif change == "half a mark":
        mark.write_bytes(mark.read_bytes()[:100])
    rows = ROWS[:1] if change == "other rows" else ROWS
    again = writer(tmp_path, rows=rows, resume=True)
    assert not again.has(torch.tensor([6]))
    put(again, *rows.tolist())
    again.finish({})
    read = RowReader(tmp_path, HEAD, ("a.npy", "b.npy"))
    assert read.arrays[0][read.places(rows)].tolist() == NUMBERS[rows].tolist()


def test_a_full_disk_is_told_at_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Any:
        def fallocate(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fallocate

    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC), raising=False)
    with pytest.raises(OSError, match="No space left"):
        put(writer(tmp_path), 6)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    put(writer(tmp_path), 6)  # a file system that cannot tell
