"""Importer ``mmrec``: the ``.inter`` file of MMRec, its split, and the ``.npy`` features beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue

from pipeline.datasets.base import RawDataset, few, require_columns
from pipeline.datasets.source_files import (
    file_sha256,
    given_feature_files,
    read_given_features,
    source_file,
    source_folder,
)
from pipeline.datasets.tables import ratings, seconds, split_labels
from pipeline.errors import DatasetError

FEATURE_FILES: Final = {"image": "image_feat.npy", "text": "text_feat.npy"}
MAPPING_FILE: Final = "i_id_mapping.csv"


class MmrecConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the files lie. Items are the rows of the features, in their order; users are numbered anew.

    Files that still have their default name may be lacking, but for the ``.inter`` file.
    """

    folder: str = Field("", description="Folder of the data set, such as `data/baby`.")
    inter: str = Field("", description="Name of the .inter file; empty: the only one in the folder.")
    user: str = Field("userID", description="Column of the user number.")
    item: str = Field("itemID", description="Column of the item number, which is its row in the features.")
    label: str = Field(
        "x_label", description="Column of the split: 0 train, 1 valid, 2 test; empty: no split."
    )
    rating: str = Field("rating", description="Column of the rating; read where it is there.")
    timestamp: str = Field("timestamp", description="Column of the time; read where it is there.")
    image_features: str = Field(FEATURE_FILES["image"], description="Name of the image features.")
    text_features: str = Field(FEATURE_FILES["text"], description="Name of the text features.")
    item_mapping: str = Field(
        MAPPING_FILE, description="Name of a CSV of item number and item id; without it the number is the id."
    )


def mmrec_identity(config: MmrecConfig) -> JsonValue:
    """Settings and the bytes of all files that are read."""
    folder = source_folder("mmrec.folder", config.folder)
    files = {"inter": _inter_file(config, folder), **_feature_files(config, folder)}
    mapping = _mapping_file(config, folder)
    if mapping is not None:
        files["mapping"] = mapping
    return {
        **config.model_dump(mode="json", exclude={"folder", "inter"}),
        "files_sha256": {role: file_sha256(path) for role, path in files.items()},
    }


def import_mmrec(config: MmrecConfig) -> RawDataset:
    """Read interactions, split and features.

    Raises:
        DatasetError: A file or column that is not there or not of its kind, an item number without a feature
            row, or a mapping that does not name every item once.
    """
    folder = source_folder("mmrec.folder", config.folder)
    path = _inter_file(config, folder)
    table = read_inter(path)
    optional = {name: getattr(config, name) for name in ("rating", "timestamp")}
    optional = {name: column if column in table.columns else "" for name, column in optional.items()}
    require_columns(
        table, {"mmrec.user": config.user, "mmrec.item": config.item, "mmrec.label": config.label}, str(path)
    )
    columns = [table[config.user].alias("user_id"), _numbers(table[config.item], path).alias("row")]
    readers = {"rating": ratings, "timestamp": seconds}
    columns += [readers[name](table[column]).alias(name) for name, column in optional.items() if column]
    if config.label:
        columns.append(split_labels(table[config.label]).alias("split"))
    interactions = pl.DataFrame(columns)

    features = {name: read_given_features(file) for name, file in _feature_files(config, folder).items()}
    n_items = _count_items(interactions["row"].to_numpy(), features, path)
    item_ids = _item_ids(config, folder, n_items)
    items = pl.DataFrame({"item_id": item_ids})
    named = interactions.with_columns(
        pl.Series("item_id", item_ids, dtype=pl.String).gather(interactions["row"])
    )
    order = [name for name in ("user_id", "item_id", "rating", "timestamp", "split") if name in named.columns]
    return RawDataset(items=items, interactions=named.select(order), given_features=features)


def read_inter(path: Path) -> pl.DataFrame:
    """Read an ``.inter`` file, all columns as strings.

    Fields are separated by tabs or by commas, whichever the header has; lines may end in CRLF; a type behind
    a column's name, as in RecBole's ``itemID:token``, is cut off.

    Raises:
        DatasetError: No header of several columns, or lines that do not fit it.
    """
    content = path.read_bytes().replace(b"\r\n", b"\n").removeprefix(b"\xef\xbb\xbf")
    header = content.partition(b"\n")[0]
    separator = "\t" if b"\t" in header else ","
    if separator.encode() not in header:
        raise DatasetError(
            f"{path} starts with {header[:80]!r}; expected the names of its columns, separated by tabs or "
            "commas. Give the file its header line."
        )
    try:
        table = pl.read_csv(content, separator=separator, infer_schema=False, quote_char=None)
    except pl.exceptions.PolarsError as error:
        raise DatasetError(
            f"{path} cannot be read: {str(error).splitlines()[0]}. Every line needs the fields of the header."
        ) from error
    return table.rename(lambda name: name.partition(":")[0].strip())


def _inter_file(config: MmrecConfig, folder: Path) -> Path:
    if config.inter:
        return source_file("mmrec.inter", str(folder / config.inter))
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        names = few([path.name for path in found]) if found else "none"
        raise DatasetError(
            f"{folder} has {len(found)} .inter files ({names}); name the one to read in mmrec.inter."
        )
    return found[0]


def _feature_files(config: MmrecConfig, folder: Path) -> dict[str, Path]:
    return given_feature_files(
        folder, {"image": config.image_features, "text": config.text_features}, FEATURE_FILES
    )


def _mapping_file(config: MmrecConfig, folder: Path) -> Path | None:
    if not config.item_mapping:
        return None
    path = folder / config.item_mapping
    if config.item_mapping == MAPPING_FILE and not path.is_file():
        return None
    return source_file("mmrec.item_mapping", str(path))


def _numbers(column: pl.Series, path: Path) -> pl.Series:
    numbers = column.cast(pl.Int64, strict=False)
    bad = column.filter(numbers.is_null() | (numbers < 0)).unique(maintain_order=True).to_list()
    if bad:
        raise DatasetError(
            f"{path}: column {column.name!r} holds {few(bad)}; expected item numbers from 0, the rows of the "
            "features. Look at mmrec.item."
        )
    return numbers


def _count_items(rows: NDArray[np.int64], features: dict[str, NDArray[np.float32]], path: Path) -> int:
    """All features must have a row for each item that the interactions name."""
    needed = int(rows.max()) + 1 if len(rows) else 0
    sizes = {name: len(vectors) for name, vectors in features.items()}
    if len(set(sizes.values())) > 1:
        raise DatasetError(
            f"The features have different numbers of rows: {sizes}. Bring features of the same items."
        )
    n_items = next(iter(sizes.values()), needed)
    if n_items < needed:
        raise DatasetError(
            f"{path} names item {needed - 1}, but the features have {n_items:,} rows. "
            "Bring the features of this data set."
        )
    return n_items


def _item_ids(config: MmrecConfig, folder: Path, n_items: int) -> list[str]:
    path = _mapping_file(config, folder)
    if path is None:
        return [str(row) for row in range(n_items)]
    table = read_inter(path)
    require_columns(table, {"mmrec.item": config.item}, str(path))
    others = [name for name in table.columns if name != config.item]
    if len(others) != 1:
        raise DatasetError(
            f"{path} has the columns {', '.join(table.columns)}; expected {config.item!r} and one column of "
            "item ids. Remove the others."
        )
    ids: list[str | None] = [None] * n_items
    for row, name in zip(
        _numbers(table[config.item], path).to_list(), table[others[0]].to_list(), strict=True
    ):
        if row >= n_items or ids[row] is not None or not name:
            raise DatasetError(
                f"{path}: item number {row} ({name!r}) is repeated, without an id, or beyond {n_items - 1}."
            )
        ids[row] = name
    known = [name for name in ids if name is not None]
    if len(known) < n_items:
        lacking = [row for row, name in enumerate(ids) if name is None]
        raise DatasetError(
            f"{path} names {len(known):,} of {n_items:,} items; without a name: {few(lacking)}. "
            "Add them, or set mmrec.item_mapping to ''."
        )
    return known
