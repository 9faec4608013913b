import errno
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import parts
from features.errors import FeatureError, FeatureFileError
from features.parts import PartFile, PartRows, part_name, rows_per_part, write_part


def some_rows(n_rows: int = 30, dim: int = 5, dtype: str = "float16") -> PartRows:
    vectors = np.random.default_rng(0).standard_normal((n_rows, dim)).astype(dtype)
    vectors[3] = 0
    return PartRows(
        [f"item-{row}" for row in range(n_rows)],
        [None if row == 3 else f"{row:064x}" for row in range(n_rows)],
        ["missing" if row == 3 else "ok" for row in range(n_rows)],
        ["no picture" if row == 3 else None for row in range(n_rows)],
        vectors,
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read_again(tmp_path: Path, dtype: str) -> None:
    rows = some_rows(dtype=dtype)
    write_part(tmp_path / "part.parquet", rows, {"recipe": "abc"})
    with PartFile(tmp_path / "part.parquet") as part:
        assert (part.n_rows, part.dim, part.dtype) == (30, 5, np.dtype(dtype))
        assert part.metadata["recipe"] == "abc"
        read = part.rows()
    assert (read.item_ids, read.content_hashes) == (rows.item_ids, rows.content_hashes)
    assert (read.statuses, read.reasons) == (rows.statuses, rows.reasons)
    np.testing.assert_array_equal(read.vectors, rows.vectors)


def test_equal_rows_give_equal_bytes_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_part(tmp_path / name, some_rows(), {"x": "1", "a": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_other_readers_see_an_ordinary_column(tmp_path: Path) -> None:
    rows = some_rows()
    write_part(tmp_path / "part.parquet", rows)
    embedding = pl.read_parquet(tmp_path / "part.parquet")["embedding"]
    np.testing.assert_array_equal(np.frombuffer(b"".join(embedding), np.float16).reshape(30, 5), rows.vectors)
    schema = pq.read_schema(tmp_path / "part.parquet")
    assert schema.field("embedding").type == pa.binary(10)
    assert not schema.field("embedding").nullable
    assert schema.metadata[b"tandem.dim"] == b"5"
    assert schema.metadata[b"tandem.dtype"] == b"float16"
    assert schema.metadata[b"tandem.format"] == b"1"


@pytest.mark.parametrize(("n_rows", "dim"), [(1, 1), (30, 5), (3000, 64)])
def test_our_own_layout_is_read_as_one_run_of_bytes(tmp_path: Path, n_rows: int, dim: int) -> None:
    rows = some_rows(max(n_rows, 4), dim)
    write_part(tmp_path / "part.parquet", rows)
    offset = PartFile(tmp_path / "part.parquet").vectors_offset
    assert offset is not None
    data = (tmp_path / "part.parquet").read_bytes()
    assert data[offset : offset + rows.vectors.nbytes] == rows.vectors.tobytes()


LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed": {"compression": "snappy", "use_dictionary": False},
    "dictionary": {"compression": "none", "use_dictionary": True},
    "several row groups": {"compression": "none", "use_dictionary": False, "row_group_size": 7},
    "several pages": {
        "compression": "none",
        "use_dictionary": False,
        "data_page_size": 16,
        "write_batch_size": 4,
    },
    "byte stream split": {
        "compression": "none",
        "use_dictionary": False,
        "column_encoding": {"embedding": "BYTE_STREAM_SPLIT"},
    },
    "page version 2": {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_other_layout_is_decoded_and_gives_the_same(tmp_path: Path, layout: str) -> None:
    path, rows = tmp_path / "part.parquet", some_rows()
    write_part(path, rows)
    pq.write_table(pq.read_table(path), path, **LAYOUTS[layout])
    with PartFile(path) as part:
        assert part.vectors_offset is None
        np.testing.assert_array_equal(part.rows().vectors, rows.vectors)
        np.testing.assert_array_equal(part.mapped(), rows.vectors)


def test_a_nullable_column_is_decoded_and_a_null_refused(tmp_path: Path) -> None:
    path, rows = tmp_path / "part.parquet", some_rows()
    write_part(path, rows)
    table = pq.read_table(path)
    position = table.schema.get_field_index("embedding")
    field = pa.field("embedding", pa.binary(10))
    schema = table.schema.set(position, field)
    pq.write_table(table.cast(schema), path, compression="none", use_dictionary=False)
    with PartFile(path) as part:
        assert part.vectors_offset is None
        np.testing.assert_array_equal(part.vectors(), rows.vectors)
    values = table["embedding"].to_pylist()
    values[4] = None
    broken = table.set_column(position, field, [pa.array(values, pa.binary(10))])
    pq.write_table(broken.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(FeatureFileError, match="1 embeddings are null"):
        PartFile(path).vectors()


def test_the_page_header_is_read_as_thrift_says() -> None:
    # PageHeader{type=0, uncompressed=300, compressed=300, data_page{num_values=30, encoding=0, 3, 3, {}}}
    header = bytes.fromhex("150015d80415d8042c153c1500150615061c000000")
    fields, end = parts._read_struct(header + b"values") or ({}, 0)
    assert fields == {1: 0, 2: 300, 3: 300, 5: {1: 30, 2: 0, 3: 3, 4: 3, 5: {}}}
    assert end == len(header)


@pytest.mark.parametrize("header", ["", "15", "1580", "0502", "1d00", "18ff"])
def test_bytes_that_are_no_page_header_are_none(header: str) -> None:
    assert parts._read_struct(bytes.fromhex(header)) is None


def test_a_negative_number_and_a_boolean_are_read() -> None:
    assert parts._read_struct(bytes.fromhex("150111121801ff00")) == (
        {1: -1, 2: True, 3: False, 4: b"\xff"},
        8,
    )


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_a_vector_that_is_not_finite_is_refused_before_anything_is_written(
    tmp_path: Path, bad: float, word: str
) -> None:
    rows = some_rows()
    rows.vectors[7, 2] = bad
    with pytest.raises(FeatureError, match=rf"item 'item-7' holds {word} \(1 of 30 rows"):
        write_part(tmp_path / "part.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_an_overflow_of_float16_says_to_store_float32() -> None:
    vectors = np.array([[np.inf]], np.float16)
    with pytest.raises(FeatureError, match=r"holds infinity .* store float32"):
        parts.check_finite(["a"], vectors)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_part(tmp_path / "part.parquet", some_rows())
    assert not list(tmp_path.iterdir())


def test_vectors_of_double_precision_are_a_slip_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64; a part stores float16 or float32"):
        write_part(tmp_path / "part.parquet", some_rows(dtype="float64"))


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_footer(data: bytes) -> bytes:
    return data[:-12]


def bent_footer(data: bytes) -> bytes:
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    return data[:start] + bytes(40) + data[start + 40 :]


def shifted(data: bytes) -> bytes:
    return data[:8] + data[40:]


@pytest.mark.parametrize(
    "damage", [truncated, without_footer, bent_footer, shifted, lambda _: b"", lambda _: b"<html>"]
)
def test_a_damaged_part_is_a_clear_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "part.parquet"
    write_part(path, some_rows())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FeatureFileError, match=r"part\.parquet is damaged .*extract again"):
        PartFile(path, verify=True).rows()


def test_every_flipped_bit_of_the_vectors_is_found_when_asked_for(tmp_path: Path) -> None:
    path, rows = tmp_path / "part.parquet", some_rows()
    write_part(path, rows)
    whole = path.read_bytes()
    offset = PartFile(path).vectors_offset
    assert offset is not None
    for position in (0, 100, rows.vectors.nbytes - 1):
        flipped = bytearray(whole)
        flipped[offset + position] ^= 1
        path.write_bytes(flipped)
        PartFile(path).vectors()  # structure alone does not show it
        for read in (
            lambda: PartFile(path, verify=True).vectors(),
            lambda: PartFile(path, verify=True).mapped(),
        ):
            with pytest.raises(FeatureFileError, match="CRC checksum verification failed"):
                read()


def test_a_file_cut_while_it_is_open_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    write_part(path, some_rows())
    part = PartFile(path)
    assert part.vectors_offset is not None
    path.write_bytes(path.read_bytes()[: part.vectors_offset + 10])
    with pytest.raises(FeatureFileError, match="it ends 290 bytes early"):
        part.vectors()


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FeatureFileError, match=r"none\.parquet is not there"):
        PartFile(tmp_path / "none.parquet")


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": ["a"]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(FeatureFileError, match=r"no feature file of format 1 \(its format: none\)"):
        PartFile(tmp_path / "x.parquet")


@pytest.mark.parametrize("metadata", [{"dim": "6"}, {"dtype": "float32"}, {"dtype": "int16"}, {"dim": "six"}])
def test_metadata_that_contradict_the_column_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_part(tmp_path / "part.parquet", some_rows(), metadata)
    with pytest.raises(FeatureFileError, match=r"expected [12]\d bytes a row|is damaged"):
        PartFile(tmp_path / "part.parquet")


def test_reading_into_the_wrong_array_is_a_slip_of_the_caller(tmp_path: Path) -> None:
    write_part(tmp_path / "part.parquet", some_rows())
    with pytest.raises(ValueError, match=r"expected float16 \(30, 5\)"):
        PartFile(tmp_path / "part.parquet").read_into(np.empty((30, 5), np.float32))


def test_a_part_without_rows_is_a_part(tmp_path: Path) -> None:
    write_part(tmp_path / "part.parquet", PartRows([], [], [], [], np.empty((0, 5), np.float32)))
    part = PartFile(tmp_path / "part.parquet", verify=True)
    assert part.rows().vectors.shape == part.mapped().shape == (0, 5)


def test_parts_grow_with_the_catalogue_within_bounds() -> None:
    assert [rows_per_part(n) for n in (0, 1, 32_768, 65_536, 1_000_000, 10**8)] == [
        512,
        512,
        512,
        1024,
        15_625,
        16_384,
    ]
    assert part_name(7) == "part-00007.parquet"
