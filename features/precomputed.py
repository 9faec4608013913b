"""Vectors that another tool made, read in blocks and joined to a catalogue by item id.

Each format is a function from a path to a `VectorFiles`: which files, how wide, and an iterator of blocks.
Nothing is unpickled, and no more than a block is in memory.
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.catalogue import Modality
from features.errors import FeatureError, FeatureFileError
from features.parts import PartRows, Status, StoredDtype, part_name, rows_per_part, write_part

Numbers = NDArray[np.floating[Any]]

BLOCK_ROWS = 1024
"""Rows read at a time: 16 MB of 4,096 numbers each."""
AMAZON_DIM = 4096
"""Numbers of a record in Amazon's image features (McAuley et al., 2015, of a Caffe reference network)."""
_ID_COLUMNS = ("item_id", "id", "asin")
_MMREC_ROW = "itemID"
"""Column of MMRec's `i_id_mapping.csv` that holds an item's row."""
_EVERY: tuple[Modality, ...] = ("image", "text", "fused")


@dataclass(frozen=True)
class Block:
    """Some rows, in the order of the file."""

    ids: Sequence[str]
    vectors: Numbers
    """(N, D)."""
    skipped: int = 0
    """Rows of no wanted item that were left out here."""


@dataclass(frozen=True)
class VectorFiles:
    """What a path of one format holds."""

    files: tuple[Path, ...]
    """All that can change the vectors or their ids."""
    dims: Mapping[Modality, int]
    """Length of a vector, by the modalities it may stand for."""
    dtype: StoredDtype
    read: Callable[[Modality, Collection[str]], Iterator[Block]]
    """Blocks of a modality; a format that can tell early leaves out the rows of other ids than these."""


@dataclass(frozen=True)
class ReadingOptions:
    """What may follow a path."""

    ids: str = ""
    """File of the ids, row for row."""
    id: str = ""
    """Column of the ids."""
    vector: str = ""
    """Column of the vectors."""


def open_npy(path: Path, options: ReadingOptions) -> VectorFiles:
    """An (I, D) .npy, its ids in `+ids=<file>`, else beside it in `<name>.items.csv` and the like."""
    array = _load_npy(path, n_axes=2)
    ids_file = Path(options.ids).expanduser() if options.ids else _ids_beside(path)
    ids = read_ids(ids_file)
    if len(ids) != len(array):
        raise FeatureFileError(
            f"{path} has {len(array):,} rows, but {ids_file} {len(ids):,} ids; expected one a row, in the "
            "same order; name the right file with +ids=<file>."
        )

    def read(_modality: Modality, wanted: Collection[str]) -> Iterator[Block]:
        for start in range(0, len(ids), BLOCK_ROWS):
            some = ids[start : start + BLOCK_ROWS]
            yield _wanted_rows(some, array[start : start + len(some)], wanted)

    return VectorFiles((path, ids_file), _dims(array.shape[1]), _stored(array.dtype), read)


def open_parquet(path: Path, options: ReadingOptions) -> VectorFiles:
    """A .parquet file, or a folder of them, with a column of ids and one of lists or of bytes."""
    files = (path,) if path.is_file() else tuple(sorted(path.rglob("*.parquet")))
    if not files:
        raise FeatureFileError(f"{path} holds no .parquet file; name one, or the folder they are in.")
    first = _open_parquet(files[0])
    schema = first.schema_arrow
    id_column = _column(schema.names, options.id, _ID_COLUMNS, "id", files[0])
    column = _column(schema.names, options.vector, ("embedding", "vector"), "vector", files[0])
    metadata = schema.metadata or {}
    own = b"tandem.format" in metadata and "status" in schema.names
    dtype = np.dtype(metadata.get(b"tandem.dtype", b"float32").decode() if own else "float32")
    columns = [id_column, column, *(["status"] if own else [])]

    def blocks() -> Iterator[Block]:
        for file in files:
            for batch in _open_parquet(file).iter_batches(BLOCK_ROWS, columns=columns):
                table = pa.Table.from_batches([batch])
                keep = table[column].is_valid().to_numpy()
                if own:
                    keep &= np.array([status == "ok" for status in table["status"].to_pylist()])
                table = table.filter(pa.array(keep))
                ids = [str(item_id) for item_id in table[id_column].to_pylist()]
                if ids:
                    yield Block(ids, _matrix(table[column].combine_chunks(), dtype, file, column))

    found = next(blocks(), None)
    if found is None:
        raise FeatureFileError(f"{files[0]}: its column {column!r} holds no vector; name another one.")
    return VectorFiles(
        files,
        _dims(found.vectors.shape[1]),
        _stored(found.vectors.dtype),
        lambda _modality, _wanted: blocks(),
    )


def open_ducho(path: Path, options: ReadingOptions) -> VectorFiles:  # noqa: ARG001 - all formats open alike
    """A folder with a .npy for each item, named by its id, with 1 x D or D numbers inside."""
    files = tuple(sorted(path.glob("*.npy")))
    if not files:
        raise FeatureFileError(f"{path} holds no .npy file; expected one for each item, named by its id.")
    first = _load_row(files[0])

    def read(_modality: Modality, wanted: Collection[str]) -> Iterator[Block]:
        chosen = [file for file in files if file.stem in wanted] or list(files[:1])
        for start in range(0, len(chosen), BLOCK_ROWS):
            some = chosen[start : start + BLOCK_ROWS]
            rows = [_load_row(file) for file in some]
            for file, row in zip(some, rows, strict=True):
                if len(row) != len(first):
                    raise FeatureFileError(
                        f"{file} holds {len(row)} numbers, but {files[0].name} {len(first)}."
                    )
            skipped = len(files) - len(chosen) if start == 0 else 0
            yield Block([file.stem for file in some], np.stack(rows), skipped)

    return VectorFiles(files, _dims(len(first)), _stored(first.dtype), read)


def open_clip_retrieval(path: Path, options: ReadingOptions) -> VectorFiles:
    """A folder as clip-retrieval writes it: `img_emb/` or `text_emb/`, row for row with `metadata/`."""
    folders: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
    shards = {modality: _shards(path / name) for modality, name in folders.items() if (path / name).is_dir()}
    shards = {modality: files for modality, files in shards.items() if files}
    if not shards:
        raise FeatureFileError(
            f"{path} has neither img_emb/ nor text_emb/ with files such as img_emb_0.npy; expected a folder "
            "as `clip-retrieval inference` writes it."
        )
    metadata = {}
    for files in shards.values():
        for number, file in files.items():
            beside = path / "metadata" / f"metadata_{number}.parquet"
            if not beside.is_file():
                raise FeatureFileError(f"{file} has no {beside} beside it, which names its rows.")
            metadata[number] = beside
    arrays = {modality: _load_npy(next(iter(files.values())), n_axes=2) for modality, files in shards.items()}
    dims: dict[Modality, int] = {modality: int(array.shape[1]) for modality, array in arrays.items()}

    def read(modality: Modality, wanted: Collection[str]) -> Iterator[Block]:
        for number, file in shards[modality].items():
            array = _load_npy(file, n_axes=2)
            ids = _clip_retrieval_ids(metadata[number], options.id)
            if len(ids) != len(array):
                raise FeatureFileError(
                    f"{file} has {len(array):,} rows, but {metadata[number]} {len(ids):,}; expected the "
                    "files of one run."
                )
            for start in range(0, len(ids), BLOCK_ROWS):
                some = ids[start : start + BLOCK_ROWS]
                yield _wanted_rows(some, array[start : start + len(some)], wanted)

    every = [file for files in shards.values() for file in files.values()]
    stored = _stored(next(iter(arrays.values())).dtype)
    return VectorFiles((*every, *metadata.values()), dims, stored, read)


def open_amazon(path: Path, options: ReadingOptions) -> VectorFiles:  # noqa: ARG001 - all formats open alike
    """Amazon's `image_features_*.b`: records of a ten-byte ASIN and 4,096 float32, little endian."""
    record = np.dtype([("id", "S10"), ("vector", "<f4", (AMAZON_DIM,))])
    size = path.stat().st_size
    if not path.is_file() or not size or size % record.itemsize:
        raise FeatureFileError(
            f"{path} has {size:,} bytes; expected records of {record.itemsize:,} (an ASIN of 10 bytes and "
            "4,096 numbers); it is cut short, or something else; fetch it again."
        )

    def read(_modality: Modality, wanted: Collection[str]) -> Iterator[Block]:
        with path.open("rb") as file:
            while len(records := np.fromfile(file, record, count=BLOCK_ROWS)):
                ids = [item_id.decode("ascii", "replace") for item_id in records["id"].tolist()]
                yield _wanted_rows(ids, records["vector"], wanted)

    return VectorFiles((path,), _dims(AMAZON_DIM), "float32", read)


def _wanted_rows(ids: Sequence[str], vectors: Numbers, wanted: Collection[str]) -> Block:
    """The rows of wanted items; where there is none the first one, so that an error can name its id."""
    rows = [row for row, item_id in enumerate(ids) if item_id in wanted] or [0]
    return Block([ids[row] for row in rows], np.asarray(vectors[rows]), skipped=len(ids) - len(rows))


FORMATS: dict[str, Callable[[Path, ReadingOptions], VectorFiles]] = {
    "npy": open_npy,
    "parquet": open_parquet,
    "ducho": open_ducho,
    "clip-retrieval": open_clip_retrieval,
    "amazon": open_amazon,
}
"""Word after `precomputed/` -> its reader."""


@dataclass
class JoinCounts:
    """Where the rows of a file and the items of a catalogue went."""

    n_ok: int = 0
    n_missing: int = 0
    n_unreadable: int = 0
    unused: int = 0
    """Rows of the file that belong to no item."""
    reasons: dict[str, int] = field(default_factory=dict)


def join_vectors(
    source: VectorFiles,
    modality: Modality,
    item_ids: Sequence[str],
    folder: Path,
    scratch: Path,
    *,
    unit_length: bool = False,
) -> JoinCounts:
    """Write a catalogue's rows of precomputed vectors as parts, in the catalogue's order.

    The rows come in any order, so they are first put in place in a file of (I, D) numbers.

    Args:
        source: What one of `FORMATS` opened.
        modality: Of the vectors.
        item_ids: The catalogue's, in order.
        folder: Gets `part-00000.parquet`, ...
        scratch: Gets the file, which is deleted at the end.
        unit_length: Divide each vector by its Euclidean length.

    Raises:
        FeatureError: No id is in the catalogue, or an id has two different vectors.
        FeatureFileError: The files are not as their format says.
    """
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    dim, aside = source.dims[modality], scratch / "vectors.bin"
    codes = np.zeros(len(item_ids), np.int8)  # 0 missing, 1 ok, 2 NaN, 3 infinity
    counts = JoinCounts()
    try:
        vectors = np.memmap(aside, source.dtype, "w+", shape=(max(len(item_ids), 1), dim))
        foreign = ""
        for block in source.read(modality, row_of):
            if block.vectors.shape != (len(block.ids), dim):
                raise FeatureFileError(
                    f"{source.files[0]}: vectors of {block.vectors.shape[1]} numbers follow others of {dim}; "
                    "expected one length."
                )
            known = [at for at, item_id in enumerate(block.ids) if item_id in row_of]
            counts.unused += block.skipped + len(block.ids) - len(known)
            if len(known) < len(block.ids) and not foreign:
                foreign = next(item_id for item_id in block.ids if item_id not in row_of)
            _put(block, known, row_of, vectors, codes)
        if not codes.any():
            raise FeatureError(
                f"none of the ids of {source.files[0]} is in the catalogue: the file has {foreign!r}, the "
                f"catalogue {item_ids[0] if item_ids else '(no items)'!r}; expected ids of the same kind; "
                "name the right column or file of ids."
            )
        _write(vectors, codes, item_ids, folder, counts, unit_length=unit_length)
    finally:
        aside.unlink(missing_ok=True)
    return counts


def _put(
    block: Block, known: Sequence[int], row_of: Mapping[str, int], vectors: Numbers, codes: NDArray[np.int8]
) -> None:
    """Put a block's rows of known items in their place.

    Raises:
        FeatureError: An item has two different vectors.
    """
    found = block.vectors[known]
    nan = np.isnan(found).any(axis=1) if found.dtype.kind == "f" else np.zeros(len(found), bool)
    code_of = np.where(nan, 2, np.where(np.isfinite(found).all(axis=1), 1, 3)).astype(np.int8)
    for at, vector, code in zip(known, found, code_of, strict=True):
        row = row_of[block.ids[at]]
        stored = vector.astype(vectors.dtype)
        same = codes[row] == code and (code != 1 or np.array_equal(vectors[row], stored))
        if codes[row] and not same:
            raise FeatureError(
                f"item {block.ids[at]!r} has two rows with different vectors; expected one an item; drop one."
            )
        codes[row] = code
        if code == 1:
            vectors[row] = stored


_STATUS_OF: tuple[Status, ...] = ("missing", "ok", "unreadable", "unreadable")
_REASON_OF = ("the file has no row of it", None, "its vector holds NaN", "its vector holds infinity")


def _write(
    vectors: Numbers,
    codes: NDArray[np.int8],
    item_ids: Sequence[str],
    folder: Path,
    counts: JoinCounts,
    *,
    unit_length: bool,
) -> None:
    n_rows = rows_per_part(len(item_ids))
    for number, start in enumerate(range(0, len(item_ids), n_rows)):
        ids = item_ids[start : start + n_rows]
        rows = np.array(vectors[start : start + len(ids)])
        part = codes[start : start + len(ids)]
        if unit_length:
            lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
            rows = (rows / np.where(lengths == 0, 1, lengths)).astype(rows.dtype)
        statuses = [_STATUS_OF[code] for code in part]
        reasons = [_REASON_OF[code] for code in part]
        write_part(folder / part_name(number), PartRows(ids, [None] * len(ids), statuses, reasons, rows))
    counts.n_ok = int((codes == 1).sum())
    counts.n_missing = int((codes == 0).sum())
    counts.n_unreadable = int((codes > 1).sum())
    tally = {reason: int((codes == code).sum()) for code, reason in enumerate(_REASON_OF) if reason}
    counts.reasons = {reason: n for reason, n in tally.items() if n}


def read_ids(path: Path) -> list[str]:
    """The ids of a file, in its order: .txt, .csv, .tsv, .json, .npy or .parquet.

    A table has a column `item_id` (or `id`, `asin`), or a single one. MMRec's `i_id_mapping.csv` is known by
    its column `itemID`, which says in which row an item is.

    Raises:
        FeatureFileError: No such file, another kind of file, or not a list of ids.
    """
    if not path.is_file():
        raise FeatureFileError(f"there is no file of ids {str(path)!r}; name one with +ids=<file>.")
    readers: dict[str, Callable[[Path], list[str]]] = {
        ".txt": lambda file: file.read_text(encoding="utf-8").splitlines(),
        ".json": _ids_of_json,
        ".npy": lambda file: [str(item_id) for item_id in _load_npy(file, n_axes=1).tolist()],
        ".csv": _ids_of_table,
        ".tsv": _ids_of_table,
        ".parquet": _ids_of_table,
    }
    if path.suffix not in readers:
        raise FeatureFileError(
            f"the file of ids {str(path)!r} ends in {path.suffix!r}; expected one of {', '.join(readers)}."
        )
    try:
        return readers[path.suffix](path)
    except (ValueError, pl.exceptions.PolarsError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise FeatureFileError(f"the file of ids {str(path)!r} cannot be read ({reason}).") from error


def _ids_of_json(path: Path) -> list[str]:
    ids = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(ids, list):
        raise FeatureFileError(f"{path} holds {type(ids).__name__}; expected a list of ids.")
    return [str(item_id) for item_id in ids]


def _ids_of_table(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        table = pl.read_parquet(path)
    else:
        header = path.open(encoding="utf-8").readline()
        table = pl.read_csv(path, separator="\t" if "\t" in header else ",", infer_schema=False)
    table = table.rename({name: name.partition(":")[0].strip() for name in table.columns})
    if _MMREC_ROW in table.columns and len(table.columns) == 2:
        other = next(name for name in table.columns if name != _MMREC_ROW)
        ordered = table.with_columns(pl.col(_MMREC_ROW).cast(pl.Int64)).sort(_MMREC_ROW)
        if ordered[_MMREC_ROW].to_list() != list(range(len(ordered))):
            raise FeatureFileError(f"{path}: its column {_MMREC_ROW} does not count the rows from 0.")
        return [str(item_id) for item_id in ordered[other].to_list()]
    known = [name for name in _ID_COLUMNS if name in table.columns] or table.columns
    if len(known) != 1 and known[0] not in _ID_COLUMNS:
        raise FeatureFileError(f"{path} has the columns {', '.join(known)}; call that of the ids item_id.")
    return [str(item_id) for item_id in table[known[0]].to_list()]


def _ids_beside(path: Path) -> Path:
    for suffix in (".items.csv", ".ids.txt", ".ids.csv", ".ids.json", ".ids.npy", ".ids.parquet"):
        if (beside := path.with_name(path.stem + suffix)).is_file():
            return beside
    raise FeatureFileError(
        f"{path} says nothing about its rows' items, which are joined by id and never by position; name the "
        f"file of their ids: precomputed/npy:{path}+ids=<file>."
    )


def _load_npy(path: Path, *, n_axes: int) -> NDArray[Any]:
    """An array that stays on disk until it is looked at; nothing is unpickled."""
    if not path.is_file():
        raise FeatureFileError(f"there is no file {str(path)!r}; check the path.")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        if "pickle" in reason or "Object" in reason or "object" in reason:
            reason = "it holds Python objects, which are not unpickled; save it anew as plain numbers"
        raise FeatureFileError(f"{path} cannot be read ({reason}).") from error
    numbers = n_axes == 1 or array.dtype.kind in "fiu"
    if array.ndim != n_axes or not numbers:
        what = "ids, one after the other" if n_axes == 1 else "(items, numbers)"
        raise FeatureFileError(f"{path} holds {array.dtype} of shape {array.shape}; expected {what}.")
    return array


def _load_row(path: Path) -> Numbers:
    """The only vector of a .npy: D or 1 x D."""
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise FeatureFileError(f"{path} cannot be read ({reason}); nothing is unpickled.") from error
    if array.dtype.kind not in "fiu" or array.ndim == 0 or array.size != array.shape[-1]:
        raise FeatureFileError(f"{path} holds {array.dtype} of shape {array.shape}; expected 1 x D numbers.")
    return array.reshape(-1)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise FeatureFileError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}).") from error


def _column(names: Sequence[str], typed: str, usual: Sequence[str], option: str, path: Path) -> str:
    """The column that was named, or the usual one that is there."""
    for name in [typed] if typed else usual:
        if name in names:
            return name
    near = difflib.get_close_matches(typed, names, n=1) if typed else []
    hint = (
        f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(names)} with +{option}=<column>."
    )
    wanted = repr(typed) if typed else " or ".join(usual)
    raise FeatureFileError(f"{path} has no column {wanted}; {hint}")


def _matrix(column: pa.Array, dtype: np.dtype[Any], path: Path, name: str) -> Numbers:
    """(N, D) numbers of a column of lists or of bytes."""
    kind = column.type
    n_rows = len(column)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = column.flatten().to_numpy(zero_copy_only=False)
    elif pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        widths = {len(value) for value in column.to_pylist()}
        if len(widths) != 1 or next(iter(widths)) % dtype.itemsize:
            raise FeatureFileError(f"{path}: the bytes of column {name!r} are no rows of {dtype}.")
        flat = np.frombuffer(b"".join(column.to_pylist()), dtype)
    else:
        raise FeatureFileError(f"{path}: column {name!r} holds {kind}; expected lists of numbers, or bytes.")
    lengths = set() if not pa.types.is_list(kind) else set(column.value_lengths().to_pylist())
    if flat.dtype.kind not in "fiu" or len(flat) % n_rows or len(lengths) > 1:
        raise FeatureFileError(
            f"{path}: column {name!r} does not hold lists of one length with numbers and nothing else."
        )
    return np.asarray(flat).reshape(n_rows, -1)


def _shards(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("*.npy"):
        if match := re.fullmatch(r".*_([0-9]+)", path.stem):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _clip_retrieval_ids(path: Path, column: str) -> list[str]:
    """The named column, or `item_id`, or the names of the pictures' files."""
    names = _open_parquet(path).schema_arrow.names
    chosen = _column(names, column, ("item_id", "image_path"), "id", path)
    ids = [str(item_id) for item_id in pl.read_parquet(path, columns=[chosen])[chosen].to_list()]
    return [Path(item_id).stem for item_id in ids] if chosen == "image_path" and not column else ids


def _dims(dim: int) -> dict[Modality, int]:
    return dict.fromkeys(_EVERY, int(dim))


def _stored(dtype: np.dtype[Any]) -> StoredDtype:
    return "float16" if dtype == np.float16 else "float32"
