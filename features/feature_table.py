"""A feature set in memory: ids, vectors, status; align to an item order, shuffle, write."""

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from features.errors import FeatureFileError
from features.parts import ROW_COLUMNS, STATUSES, PartFile, PartRows, part_name, rows_per_part, write_part

StatusType = pl.Enum(list(STATUSES))


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """All vectors of one encoder over one catalogue."""

    item_ids: pl.Series
    """(I,) strings, unique."""
    vectors: Tensor
    """(I, F) float16 or float32 as stored; zeros where the status is not `ok`."""
    status: pl.Series
    """(I,) `ok`, `missing` or `unreadable`."""

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return int(self.vectors.shape[1])

    @property
    def present(self) -> Tensor:
        """(I,) bool: the items that have a vector."""
        return torch.from_numpy((self.status == "ok").to_numpy().copy())

    @classmethod
    def read(cls, paths: Sequence[Path], *, verify: bool = False) -> "FeatureSet":
        """Read the parts of a feature set, in the order given, straight into one tensor.

        Args:
            paths: The parts' files.
            verify: Compare each page with its checksum, which finds single flipped bits, at half the speed.

        Raises:
            FeatureFileError: A part is missing, damaged or cut short, parts differ in dimension or type,
                an item is there twice, or there is no part at all.
        """
        if not paths:
            raise FeatureFileError("a feature set without parts cannot be read; extract it again.")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            opened = pool.map(lambda path: _open(path, verify=verify), paths)
            parts, ids, codes = zip(*opened, strict=True)
            _check_alike(parts)
            starts = [0, *itertools.accumulate(part.n_rows for part in parts)]
            # NumPy asks for huge pages where torch does not: first touch is then three times faster.
            vectors = np.empty((starts[-1], parts[0].dim), parts[0].dtype)
            reads = [
                pool.submit(part.read_into, vectors[start : start + part.n_rows])
                for part, start in zip(parts, starts[:-1], strict=True)
            ]
            # The rest is done while the vectors are read.
            item_ids = pl.Series("item_id", pa.concat_arrays(ids))
            status = pl.Series("status", np.concatenate(codes).view(np.uint8)).cat.to(StatusType)
            _check_unique(item_ids, parts, starts)
            for read in reads:
                read.result()
        return cls(item_ids, torch.from_numpy(vectors), status)

    def align(
        self, item_ids: Sequence[str] | pl.Series, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Vectors in the order of `item_ids`, and which of these items have one.

        Returns:
            (I, F) vectors, zeros for an item without one or unknown here; (I,) bool.
        """
        wanted = pl.Series("item_id", item_ids, dtype=pl.String)
        if len(wanted) == len(self) and wanted.equals(self.item_ids):
            present = self.present
            vectors = self.vectors.to(dtype, copy=True)
        else:
            known = self.item_ids.alias("item_id").to_frame().with_row_index("row")
            joined = wanted.to_frame().join(known, on="item_id", how="left", maintain_order="left")
            rows = torch.from_numpy(joined["row"].cast(pl.Int64).fill_null(-1).to_numpy().copy())
            present = rows >= 0
            present[present.clone()] = self.present[rows[present]]
            vectors = torch.zeros((len(wanted), self.dim), dtype=dtype)
            vectors[present] = self.vectors[rows[present]].to(dtype)
        vectors[~present] = 0
        return vectors, present


def read_rows(paths: Sequence[Path]) -> pl.DataFrame:
    """The parts' columns item_id, content_hash, status and reason, without the vectors.

    Raises:
        FeatureFileError: A part is missing or damaged.
    """
    tables = []
    for path in paths:
        with PartFile(path) as part:
            tables.append(part.columns(ROW_COLUMNS))
    if not tables:
        raise FeatureFileError("a feature set without parts cannot be read; extract it again.")
    table = pa.concat_tables(tables).unify_dictionaries()
    frame = pl.from_arrow(table.replace_schema_metadata(None))
    assert isinstance(frame, pl.DataFrame)  # noqa: S101 - narrows from_arrow's union for the type checker
    return frame.with_columns(pl.col("status").cast(pl.String).cast(StatusType))


def _check_alike(parts: Sequence[PartFile]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if (part.dim, part.dtype) != (first.dim, first.dtype):
            raise FeatureFileError(
                f"{part.path} holds {part.dim} x {part.dtype}, but {first.path.name} beside it {first.dim} x "
                f"{first.dtype}; expected parts of one extraction; remove the strange ones or extract again."
            )


def _open(path: Path, *, verify: bool) -> tuple[PartFile, pa.Array, npt.NDArray[np.int8]]:
    part = PartFile(path, verify=verify)
    return part, *part.ids_and_codes()


def _check_unique(item_ids: pl.Series, parts: Sequence[PartFile], starts: Sequence[int]) -> None:
    # Equal ids have equal hashes, and counting numbers is faster than counting strings.
    if item_ids.hash().n_unique() == len(item_ids) or item_ids.n_unique() == len(item_ids):
        return
    repeated = item_ids.filter(item_ids.is_duplicated())[0]
    rows = (item_ids == repeated).arg_true().to_list()[:2]
    names = [parts[int(np.searchsorted(starts, row, side="right")) - 1].path for row in rows]
    raise FeatureFileError(
        f"item {repeated!r} is there twice, in {names[0]} and {names[1].name}; expected one row an item; "
        "remove the strange part or extract again."
    )


def shuffle_rows(features: FeatureSet, rng: np.random.Generator) -> FeatureSet:
    """Deal the vectors to other items: a control with the same vectors and none of the meaning.

    The items that have a vector form one random cycle and each gets its neighbour's, so none keeps its own
    (unless it is the only one); who is missing stays missing.
    """
    rows = torch.from_numpy(rng.permutation(np.flatnonzero(features.present.numpy())))
    vectors = features.vectors.clone()
    vectors[rows] = features.vectors[rows.roll(1)]
    return FeatureSet(features.item_ids, vectors, features.status)


def write_features(
    folder: Path,
    features: FeatureSet,
    *,
    n_rows: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write vectors that did not come from an extraction (given, shuffled) as parts; they carry no hashes.

    Args:
        folder: Where the parts go.
        features: What they hold.
        n_rows: Rows of a part; 0 chooses by the number of items.
        metadata: See `write_part`.

    Raises:
        FeatureError: An embedding is not finite.
    """
    paths = []
    n_rows = n_rows or rows_per_part(len(features))
    for number, start in enumerate(range(0, max(len(features), 1), n_rows)):
        part = slice(start, start + n_rows)
        ids = features.item_ids[part].to_list()
        rows = PartRows(
            ids,
            [None] * len(ids),
            features.status[part].to_list(),
            [None] * len(ids),
            features.vectors[part].numpy(),
        )
        paths.append(folder / part_name(number))
        write_part(paths[-1], rows, metadata)
    return paths
