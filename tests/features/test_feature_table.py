from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.errors import FeatureError, FeatureFileError
from features.feature_table import (
    FeatureSet,
    StatusType,
    read_rows,
    shuffle_rows,
    write_features,
)
from features.parts import PartRows, write_part


def some_features(n_items: int = 20, dim: int = 4, dtype: torch.dtype = torch.float16) -> FeatureSet:
    """Every fifth item has no vector."""
    vectors = torch.randn(n_items, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    status = ["missing" if row % 5 == 4 else "ok" for row in range(n_items)]
    vectors[4::5] = 0
    return FeatureSet(
        pl.Series("item_id", [f"i{row}" for row in range(n_items)], dtype=pl.String),
        vectors,
        pl.Series("status", status, dtype=StatusType),
    )


def one_part(path: Path, ids: list[str], dim: int = 2, dtype: str = "float32") -> Path:
    nothing = [None] * len(ids)
    write_part(path, PartRows(ids, nothing, ["ok"] * len(ids), nothing, np.ones((len(ids), dim), dtype)))
    return path


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_are_read_in_order_into_one_tensor(tmp_path: Path, dtype: torch.dtype, verify: bool) -> None:
    features = some_features(dtype=dtype)
    paths = write_features(tmp_path, features, n_rows=7)
    assert len(paths) == 3
    read = FeatureSet.read(paths, verify=verify)
    assert read.vectors.dtype == dtype
    assert torch.equal(read.vectors, features.vectors)
    assert read.item_ids.equals(features.item_ids)
    assert read.status.equals(features.status)
    assert torch.equal(read.present, torch.arange(20) % 5 != 4)
    assert (len(read), read.dim) == (20, 4)


def test_a_set_without_items_is_read(tmp_path: Path) -> None:
    read = FeatureSet.read(write_features(tmp_path, some_features(0)))
    assert read.vectors.shape == (0, 4)
    vectors, present = read.align(["a"])
    assert vectors.tolist() == [[0] * 4]
    assert present.tolist() == [False]


def test_statuses_with_another_dictionary_are_read(tmp_path: Path) -> None:
    (path,) = write_features(tmp_path, some_features())
    table = pq.read_table(path)
    status = pa.array(table["status"].to_pylist()).dictionary_encode()
    assert status.dictionary.to_pylist() == ["ok", "missing"]
    pq.write_table(table.set_column(2, "status", status), path)
    assert FeatureSet.read([path]).status.equals(some_features().status)


def test_an_unknown_status_is_a_damaged_file(tmp_path: Path) -> None:
    (path,) = write_features(tmp_path, some_features())
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "status", pa.array(["fine"] * 20)), path)
    with pytest.raises(FeatureFileError, match="is damaged"):
        FeatureSet.read([path])


def test_no_parts_at_all_is_a_clear_error() -> None:
    for read in (FeatureSet.read, read_rows):
        with pytest.raises(FeatureFileError, match="without parts"):
            read([])


@pytest.mark.parametrize(("dim", "dtype"), [(3, "float32"), (2, "float16")])
def test_parts_of_different_extractions_are_refused(tmp_path: Path, dim: int, dtype: str) -> None:
    paths = [one_part(tmp_path / "a", ["a"]), one_part(tmp_path / "b", ["b"], dim, dtype)]
    with pytest.raises(FeatureFileError, match=f"holds {dim} x {dtype}, but a beside it 2 x float32"):
        FeatureSet.read(paths)


def test_an_item_that_is_there_twice_is_refused_by_name(tmp_path: Path) -> None:
    paths = [one_part(tmp_path / "a", ["x", "y"]), one_part(tmp_path / "b", ["z", "y"])]
    with pytest.raises(FeatureFileError, match=r"item 'y' is there twice, in .*a and b;"):
        FeatureSet.read(paths)


def test_a_truncated_part_among_whole_ones_is_named(tmp_path: Path) -> None:
    paths = write_features(tmp_path, some_features(), n_rows=7)
    paths[1].write_bytes(paths[1].read_bytes()[:-30])
    with pytest.raises(FeatureFileError, match=r"part-00001\.parquet is damaged"):
        FeatureSet.read(paths)


def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path) -> None:
    (path,) = write_features(tmp_path, some_features(100, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    FeatureSet.read([path])
    with pytest.raises(FeatureFileError, match="CRC"):
        FeatureSet.read([path], verify=True)


def test_the_rows_are_read_without_their_vectors(tmp_path: Path) -> None:
    rows = PartRows(
        ["a", "b", "c"],
        ["f" * 64, None, "e" * 64],
        ["ok", "missing", "unreadable"],
        [None, "no picture", "cut short"],
        np.zeros((3, 2), np.float32),
    )
    write_part(tmp_path / "part.parquet", rows)
    frame = read_rows([tmp_path / "part.parquet"])
    assert frame.columns == ["item_id", "content_hash", "status", "reason"]
    assert frame.rows()[2] == ("c", "e" * 64, "unreadable", "cut short")
    assert frame["status"].dtype == StatusType


def test_align_follows_the_ids_and_leaves_zeros_for_who_is_absent() -> None:
    features = some_features()
    vectors, present = features.align(["i3", "unknown", "i4", "i0", "i3"])
    assert vectors.dtype == torch.float32
    assert present.tolist() == [True, False, False, True, True]
    expected = features.vectors.float()
    assert torch.equal(
        vectors, torch.stack([expected[3], 0 * expected[0], 0 * expected[0], expected[0], expected[3]])
    )


def test_align_to_its_own_order_and_to_any_other_agree() -> None:
    features = some_features()
    order = np.random.default_rng(1).permutation(20)
    same, same_present = features.align(features.item_ids)
    other, other_present = features.align([f"i{row}" for row in order])
    assert torch.equal(same[order], other)
    assert torch.equal(same_present[order], other_present)
    stored, _ = features.align(features.item_ids, dtype=torch.float16)
    assert stored.dtype == torch.float16
    stored[:] = 7
    assert not torch.equal(stored, features.vectors), "the set's own vectors must stay"


def test_align_never_shows_what_an_unreadable_row_holds() -> None:
    features = some_features()
    features.vectors[4] = 9  # a row that is not `ok` has no vector, whatever its bytes are
    for ids in (features.item_ids, ["i4", "i1"]):
        vectors, present = features.align(ids)
        assert not vectors[~present].any()


def test_shuffling_deals_every_vector_to_another_item_and_nobody_goes_missing() -> None:
    features = some_features(200)
    shuffled = shuffle_rows(features, np.random.default_rng(0))
    assert shuffled.status.equals(features.status)
    present = features.present
    assert not (shuffled.vectors[present] == features.vectors[present]).all(dim=1).any()
    assert not shuffled.vectors[~present].any()
    as_rows = [sorted(map(tuple, rows[present].tolist())) for rows in (shuffled.vectors, features.vectors)]
    assert as_rows[0] == as_rows[1]
    again = shuffle_rows(features, np.random.default_rng(0))
    assert torch.equal(again.vectors, shuffled.vectors)
    assert not torch.equal(shuffle_rows(features, np.random.default_rng(1)).vectors, shuffled.vectors)


def test_given_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    features = some_features()
    features.vectors[2, 1] = torch.nan
    with pytest.raises(FeatureError, match="item 'i2' holds NaN"):
        write_features(tmp_path, features)
