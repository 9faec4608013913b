"""Source files of importers: found, read and named by their bytes, with an error a person can act on."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.datasets.base import few
from pipeline.errors import DatasetError

TABLE_SUFFIXES: Final = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")


def source_file(setting: str, value: str) -> Path:
    """The file that a setting names.

    Raises:
        DatasetError: The setting is empty, or there is no such file; files of similar names are shown.
    """
    if not value:
        raise DatasetError(f"{setting} is empty; give the path of a file.")
    path = Path(value).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DatasetError(f"{setting} is {value}, a folder; give the path of a file in it.")
    names = [other.name for other in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = f"near it there is {few(near)}" if near else f"look at {path.parent}"
    raise DatasetError(f"{setting} is {value}, which does not exist; {hint}.")


def source_folder(setting: str, value: str) -> Path:
    """The folder that a setting names.

    Raises:
        DatasetError: The setting is empty, or there is no such folder.
    """
    if not value:
        raise DatasetError(f"{setting} is empty; give the path of a folder.")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise DatasetError(f"{setting} is {value}, which is not a folder; give the path of a folder.")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_table(path: Path) -> pl.DataFrame:
    """Read a table by its ending; a ``.gz`` or ``.zst`` may follow that of a text format.

    Columns of text formats without types (CSV, TSV) come as strings, so that an id such as 00123 keeps its
    zeros; empty fields are null.

    Raises:
        DatasetError: An ending that is not known, or a file that is not of its format.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".zst"}:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in TABLE_SUFFIXES:
        raise DatasetError(f"{path} ends in {suffix!r}; a table is one of {', '.join(TABLE_SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            return pl.read_parquet(path)
        if suffix in {".csv", ".tsv"}:
            return pl.read_csv(path, separator="\t" if suffix == ".tsv" else ",", infer_schema=False)
        return pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read as {suffix[1:]}: {str(error).splitlines()[0]}. "
            "Look at the file, or give it the ending of its format."
        ) from error


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file that holds one object.

    Raises:
        DatasetError: Not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}. Bring the whole file again.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds a {type(content).__name__}; expected an object of keys and values.")
    return content


def given_feature_files(folder: Path, names: dict[str, str], defaults: dict[str, str]) -> dict[str, Path]:
    """Find the feature files that came with a dataset.

    Args:
        folder: Where they lie.
        names: Modality -> file name; "" for none.
        defaults: The names that may be absent without an error.
    """
    found = {}
    for modality, name in names.items():
        if not name or (name == defaults[modality] and not (folder / name).is_file()):
            continue
        found[modality] = source_file(f"{modality}_features", str(folder / name))
    return found


def read_given_features(path: Path) -> NDArray[np.float32]:
    """Read an ``.npy`` file of features, one row an item.

    Returns:
        (I, F) float32.

    Raises:
        DatasetError: Not an array of numbers of two dimensions, or a row with a number that is not finite.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(
            f"{path} cannot be read as .npy: {error}. Bring it again, saved by numpy.save as plain numbers."
        ) from error
    if loaded.ndim != 2 or loaded.dtype.kind not in "fiu":
        raise DatasetError(
            f"{path} holds {loaded.dtype} of shape {loaded.shape}; expected numbers of shape "
            "(items, features). Save one row for each item."
        )
    vectors: NDArray[np.float32] = np.ascontiguousarray(loaded, dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise DatasetError(
            f"{path} holds numbers that are not finite in {len(broken):,} rows: {few(broken.tolist())}. "
            "Repair these rows."
        )
    return vectors


def strings(column: pl.Series) -> pl.Series:
    """Ids as strings; empty ones are null, and 7.0 (a number that met a null on its way) is 7."""
    if column.dtype.is_float() and bool((column.drop_nulls() % 1 == 0).all()):
        column = column.cast(pl.Int64)
    text = column.cast(pl.String)
    return text.set(text == "", None)


def first_bad(values: pl.Series, converted: pl.Series) -> Sequence[object]:
    """The values that a conversion turned into null."""
    bad: list[object] = (
        values.filter(converted.is_null() & values.is_not_null()).unique(maintain_order=True).to_list()
    )
    return bad
