"""Hashing pictures: their bytes, their order, and the odd ones counted."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from pipeline.datasets.pictures import PictureLimits, hash_pictures, read_picture
from pipeline.errors import DatasetError


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def items_of(*images: str | None) -> pl.DataFrame:
    return pl.DataFrame(
        {"item_id": [str(row) for row in range(len(images))], "image": pl.Series(images, dtype=pl.String)}
    )


def test_hashes_are_of_the_bytes_and_in_order(tmp_path: Path) -> None:
    for row in range(30):
        Image.new("RGB", (2, 2), (row, 0, 0)).save(tmp_path / f"{row}.png")
    progress: list[tuple[int, int]] = []
    names = [f"{row}.png" for row in range(30)]
    hashed, counts = hash_pictures(
        items_of(*names), str(tmp_path), progress=lambda done, total: progress.append((done, total))
    )
    expected = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]
    assert hashed["image_hash"].to_list() == expected
    assert counts == {}
    assert progress[-1] == (30, 30)


def test_items_without_pictures_have_no_hash() -> None:
    hashed, counts = hash_pictures(items_of(None, None), "")
    assert hashed["image_hash"].to_list() == [None, None]
    assert hashed.schema["image_hash"] == pl.String
    without_column, _ = hash_pictures(items_of(None).drop("image"), "")
    assert without_column.columns == ["item_id", "image", "image_hash"]
    assert counts == {}


def test_odd_pictures_are_counted_and_their_items_stay(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>gone</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "wide.png").write_bytes(png_of_size(3000, 2000))
    (tmp_path / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    (tmp_path / "folder.jpg").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "good.jpg")
    names = ["page.jpg", "empty.jpg", "wide.png", "bomb.png", "folder.jpg", "gone.jpg", "good.jpg"]
    hashed, counts = hash_pictures(items_of(*names), str(tmp_path), PictureLimits(max_pixels=5_000_000))
    assert counts == {
        "pictures listed but not found (item kept without picture)": 2,
        "pictures of more pixels than allowed (item kept; extraction refuses the picture)": 2,
        "picture files that are no picture (item kept; extraction gives the reason)": 2,
    }
    assert hashed["image"].to_list() == [*names[:4], None, None, "good.jpg"]
    assert hashed["image_hash"].null_count() == 2


def test_a_picture_that_may_not_be_read_keeps_its_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    hashed, counts = hash_pictures(items_of("a.png"), str(tmp_path))
    assert hashed["image"].to_list() == ["a.png"]
    assert hashed["image_hash"].to_list() == [None]
    assert counts == {"picture files that may not be read (item kept, picture unreadable)": 1}


def test_a_failing_disk_stops_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DatasetError, match=r"'a.png' in .* cannot be read: .*Input/output error"):
        read_picture(str(tmp_path), "a.png")


def test_a_path_without_a_folder_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"leave the folder \(none given\): 'a.png'"):
        hash_pictures(items_of("a.png"), "")
