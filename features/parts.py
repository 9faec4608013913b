"""The Parquet files of a feature set: one part at a time, written whole, read at the speed of the disk.

A part holds one row group, and its column `embedding` (fixed-size binary, D numbers a row, never null) one
plain, uncompressed page. So the numbers lie in the file in one run, and a reader that has proved it from the
footer and the page's header reads them straight into its tensor; any other Parquet reader sees an ordinary
column.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import FeatureError, FeatureFileError

PART_FORMAT = "1"

Status = Literal["ok", "missing", "unreadable"]
STATUSES: tuple[Status, ...] = ("ok", "missing", "unreadable")
StoredDtype = Literal["float16", "float32"]
Vectors = npt.NDArray[np.floating[Any]]

ROW_COLUMNS = ("item_id", "content_hash", "status", "reason")
_STATUS_TYPE = pa.dictionary(pa.int8(), pa.string())


@dataclass(frozen=True)
class PartRows:
    """Rows of one part, columns of equal length."""

    item_ids: Sequence[str]
    content_hashes: Sequence[str | None]
    statuses: Sequence[Status]
    reasons: Sequence[str | None]
    vectors: Vectors
    """(N, D) float16 or float32; zeros where the status is not `ok`."""

    def __len__(self) -> int:
        return len(self.item_ids)


def rows_per_part(n_rows: int) -> int:
    """How many rows a part should hold: a kill loses at most 1/64 of the work, or 512 rows.

    At most 16,384 rows, which at 1,024 numbers of float32 a row is a file of 64 MB.
    """
    return min(max(-(-n_rows // 64), 512), 16_384)


def part_name(number: int) -> str:
    """File name of a part; names sort as the parts do up to 100,000 parts."""
    return f"part-{number:05d}.parquet"


def check_finite(item_ids: Sequence[str], vectors: Vectors) -> None:
    """Refuse vectors that hold NaN or infinity.

    Raises:
        FeatureError: It names the first such item.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        row = vectors[bad[0]]
        what = "NaN" if np.isnan(row).any() else "infinity"
        advice = "store float32, " if vectors.dtype == np.float16 and what == "infinity" else ""
        raise FeatureError(
            f"the embedding of item {item_ids[bad[0]]!r} holds {what} ({len(bad)} of {len(vectors)} rows of "
            f"its part do); expected finite numbers of type {vectors.dtype}; {advice}check the encoder's "
            "weights or its precision, and extract again."
        )


def write_part(path: Path, rows: PartRows, metadata: Mapping[str, str] | None = None) -> None:
    """Write one part under another name, then move it: `path` is whole or not there.

    Args:
        path: Where the part belongs.
        rows: What it holds; the same rows and metadata give the same bytes.
        metadata: Further entries of the schema's metadata, without their prefix `tandem.`.

    Raises:
        FeatureError: An embedding is not finite.
        OSError: The disk is full or must not be written; nothing is left behind.
    """
    check_finite(rows.item_ids, rows.vectors)
    table = _table(rows, metadata or {})
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            pq.write_table(
                table,
                file,
                compression="NONE",
                use_dictionary=["status"],
                write_statistics=False,
                row_group_size=max(len(rows), 1),
                data_page_size=2**30,
                data_page_version="1.0",
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _table(rows: PartRows, metadata: Mapping[str, str]) -> pa.Table:
    vectors = np.ascontiguousarray(rows.vectors)
    n_rows, dim = vectors.shape
    if vectors.dtype not in (np.float16, np.float32):
        raise ValueError(f"vectors are {vectors.dtype}; a part stores float16 or float32")
    embedding_type = pa.binary(dim * vectors.dtype.itemsize)
    schema = pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("content_hash", pa.string()),
            pa.field("status", _STATUS_TYPE, nullable=False),
            pa.field("reason", pa.string()),
            pa.field("embedding", embedding_type, nullable=False),
        ],
        metadata={
            "tandem.format": PART_FORMAT,
            "tandem.dim": str(dim),
            "tandem.dtype": vectors.dtype.name,
            **{f"tandem.{name}": value for name, value in sorted(metadata.items())},
        },
    )
    codes = pa.array([STATUSES.index(status) for status in rows.statuses], pa.int8())
    columns = [
        pa.array(rows.item_ids, pa.string()),
        pa.array(rows.content_hashes, pa.string()),
        pa.DictionaryArray.from_arrays(codes, pa.array(STATUSES, pa.string())),
        pa.array(rows.reasons, pa.string()),
        pa.FixedSizeBinaryArray.from_buffers(embedding_type, n_rows, [None, pa.py_buffer(vectors)]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _sync_folder(folder: Path) -> None:
    """Have the folder's entry on disk too; without it a power cut could take the new name back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_damaged(path: Path) -> Iterator[None]:
    """Turn whatever a broken file makes a reader raise into one clear error."""
    try:
        yield
    except FeatureFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        cause = " ".join(str(error).split())
        what = "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({cause})"
        raise FeatureFileError(
            f"the feature file {path} {what}; expected a whole part; run `tandem verify` on its artefact, "
            "and extract again."
        ) from error


class PartFile:
    """One part on disk, open for reading.

    Args:
        path: Its file.
        verify: Compare what is read with the pages' checksums, which finds single flipped bits; slower.

    Raises:
        FeatureFileError: The file is missing, damaged, or not a part of a feature set.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        self.path = path
        self._verify = verify
        with _as_damaged(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=verify)
            self.n_rows: int = self._file.metadata.num_rows
            schema = self._file.schema_arrow
            self.metadata = {
                key.decode().removeprefix("tandem."): value.decode()
                for key, value in (schema.metadata or {}).items()
                if key.startswith(b"tandem.")
            }
        if self.metadata.get("format") != PART_FORMAT:
            raise FeatureFileError(
                f"{path} is no feature file of format {PART_FORMAT} (its format: "
                f"{self.metadata.get('format', 'none')}); expected a file that Tandem wrote; extract again."
            )
        with _as_damaged(path):
            self.dim = int(self.metadata["dim"])
            self.dtype = np.dtype(self.metadata["dtype"])
            embedding = schema.field("embedding").type
        width = self.dim * self.dtype.itemsize
        if self.dtype.name not in ("float16", "float32") or embedding != pa.binary(width):
            raise FeatureFileError(
                f"{path} says that a row holds {self.dim} numbers of type {self.dtype}, but its column "
                f"embedding is {embedding}; expected {width} bytes a row; extract again."
            )

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._file.close()

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some of the columns, whole, in this thread."""
        with _as_damaged(self.path):
            return self._file.read(columns=list(names), use_threads=False)

    def ids_and_codes(self) -> tuple[pa.Array, npt.NDArray[np.int8]]:
        """The rows' ids, and their statuses as positions in `STATUSES`."""
        table = self.columns(("item_id", "status"))
        with _as_damaged(self.path):
            status = table["status"].combine_chunks()
            if not pa.types.is_dictionary(status.type):
                status = status.dictionary_encode()
            # As we write it the dictionary is STATUSES, and this maps 0 to 0, 1 to 1, 2 to 2.
            code_of = np.array([STATUSES.index(name) for name in status.dictionary.to_pylist()], np.int8)
            indices: npt.NDArray[np.int8] = status.indices.to_numpy(zero_copy_only=False)
            return table["item_id"].combine_chunks(), code_of[indices]

    @cached_property
    def vectors_offset(self) -> int | None:
        """Where in the file the numbers begin; None when they are not one plain run of bytes."""
        with _as_damaged(self.path):
            return _run_of_plain_values(self._file, self.path, self.n_rows * self.dim * self.dtype.itemsize)

    def read_into(self, out: Vectors) -> None:
        """Read the embeddings into `out`, (N, D) of the part's type and contiguous.

        Raises:
            FeatureFileError: The file ends early or cannot be decoded.
        """
        if out.shape != (self.n_rows, self.dim) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, expected {self.dtype} {(self.n_rows, self.dim)}"
            )
        if self.n_rows == 0:
            return
        with _as_damaged(self.path):
            if self._verify or self.vectors_offset is None:
                self._decode_into(out)
                return
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.vectors_offset)
                rest = memoryview(out.reshape(-1).view(np.uint8).data)
                while rest.nbytes:
                    n_read = file.readinto(rest)
                    if not n_read:
                        raise OSError(f"it ends {len(rest)} bytes early")
                    rest = rest[n_read:]

    def _decode_into(self, out: Vectors) -> None:
        """The same by way of pyarrow, for a file with another layout."""
        row = 0
        for chunk in self._file.read(columns=["embedding"], use_threads=False)["embedding"].chunks:
            if chunk.null_count:
                raise ValueError(f"{chunk.null_count} embeddings are null")
            width = self.dim * self.dtype.itemsize
            start = chunk.offset * width
            data = np.frombuffer(chunk.buffers()[1], np.uint8)[start : start + len(chunk) * width]
            out[row : row + len(chunk)] = data.view(self.dtype).reshape(len(chunk), self.dim)
            row += len(chunk)

    def vectors(self) -> Vectors:
        """(N, D) embeddings, in memory of their own."""
        out = np.empty((self.n_rows, self.dim), self.dtype)
        self.read_into(out)
        return out

    def mapped(self) -> Vectors:
        """(N, D) embeddings that stay on disk until they are looked at, where the layout allows that.

        With `verify` the whole column is compared with its checksum first.
        """
        if self._verify:
            self.columns(("embedding",))
        if self.vectors_offset is None or self.n_rows == 0:
            return self.vectors()
        return np.memmap(self.path, self.dtype, "r", self.vectors_offset, (self.n_rows, self.dim))

    def rows(self) -> PartRows:
        """All of the part."""
        table = self.columns(ROW_COLUMNS)
        with _as_damaged(self.path):
            item_ids, hashes, statuses, reasons = (table[name].to_pylist() for name in ROW_COLUMNS)
        return PartRows(item_ids, hashes, statuses, reasons, self.vectors())


def _run_of_plain_values(file: pq.ParquetFile, path: Path, n_bytes: int) -> int | None:
    """Offset of the embeddings when footer and page header prove that they are one run of `n_bytes`."""
    metadata = file.metadata
    if metadata.num_row_groups != 1:
        return None
    index = file.schema_arrow.get_field_index("embedding")
    column = metadata.row_group(0).column(index)
    levels = file.schema.column(index)
    plain = (
        column.physical_type == "FIXED_LEN_BYTE_ARRAY"
        and column.compression == "UNCOMPRESSED"
        and not column.has_dictionary_page
        and levels.max_definition_level == 0
        and levels.max_repetition_level == 0
    )
    header_length = column.total_compressed_size - n_bytes
    if not plain or not 0 < header_length <= 256:
        return None
    with path.open("rb", buffering=0) as raw:
        raw.seek(column.data_page_offset)
        header = _read_struct(raw.read(header_length))
    if header is None or header[1] != header_length:
        return None
    fields = header[0]
    page = fields.get(5)
    is_plain_page = (
        fields.get(1) == 0  # DATA_PAGE, version 1
        and fields.get(2) == fields.get(3) == n_bytes
        and isinstance(page, dict)
        and page.get(1) == metadata.num_rows
        and page.get(2) == 0  # Encoding.PLAIN
    )
    return column.data_page_offset + header_length if is_plain_page else None


_I16, _I32, _I64, _BINARY, _STRUCT = 4, 5, 6, 8, 12


def _read_struct(data: bytes, at: int = 0) -> tuple[dict[int, Any], int] | None:
    """A struct in Thrift's compact protocol: its fields by id, and where it ends.

    None for what a Parquet page header never holds. Source: the protocol's specification,
    github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
    """
    fields: dict[int, Any] = {}
    field_id = 0
    try:
        while data[at] != 0:
            delta, kind = data[at] >> 4, data[at] & 0x0F
            at += 1
            if delta == 0:
                return None  # the long form, for ids that are 16 or more apart
            field_id += delta
            if kind in (1, 2):  # a boolean's value is its type
                fields[field_id] = kind == 1
            elif kind in (_I16, _I32, _I64):
                number, at = _read_varint(data, at)
                fields[field_id] = (number >> 1) ^ -(number & 1)  # zigzag
            elif kind == _BINARY:
                length, at = _read_varint(data, at)
                fields[field_id], at = data[at : at + length], at + length
            elif kind == _STRUCT:
                inner = _read_struct(data, at)
                if inner is None:
                    return None
                fields[field_id], at = inner
            else:
                return None
    except IndexError:
        return None
    return fields, at + 1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of seven bits a byte, lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
