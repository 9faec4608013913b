"""Importer ``tables``: a table of items, a table of interactions, and pictures as files below a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, Field, JsonValue, model_validator

from pipeline.datasets.base import RawDataset, few, require_columns
from pipeline.datasets.pictures import (
    PictureLimits,
    check_inside,
    is_remote,
    look_at_pictures,
    read_picture,
)
from pipeline.datasets.source_files import file_sha256, first_bad, read_table, source_file, strings
from pipeline.errors import DatasetError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "0"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev", "1"), "valid"),
    **dict.fromkeys(("test", "testing", "2"), "test"),
}
"""What a split column may say, in any case."""


class TablesConfig(BaseModel, frozen=True, extra="forbid"):
    """Files and columns.

    A column that still has its default name may be lacking (but for the ids); one named otherwise must be
    there; an empty name reads none. Items keep the order of their file, and all further columns of theirs.
    """

    items: str = Field("", description="Table of items: .parquet, .csv, .tsv, .jsonl (also .gz, .zst).")
    interactions: str = Field("", description="Table of interactions, in the same formats.")
    item_id: str = Field("item_id", min_length=1, description="Column of the item's id, in both tables.")
    interaction_item_id: str = Field(
        "", description="The item's column in the interactions, where it has another name there."
    )
    user_id: str = Field("user_id", min_length=1, description="Column of the user's id.")
    title: str = Field("title", description="Column of the title.")
    description: str = Field("description", description="Column of the description.")
    image: str = Field("image", description="Column of the picture's path below `image_folder`.")
    image_folder: str = Field(
        "", description="Folder (or fsspec URL) of the pictures; empty: the folder of the items table."
    )
    image_extension: str = Field(
        "",
        description="Where pictures are named by item id: their ending, such as `.jpg`. Then the image "
        "column is not read.",
    )
    copy_pictures: bool = Field(
        False, description="Copy the pictures into the dataset; otherwise it refers to them where they lie."
    )
    picture_identity: bool = Field(
        True,
        description="The bytes of all pictures are part of the dataset's key, so that a replaced picture is "
        "noticed; without it only their names are, which is faster for very many pictures.",
    )
    rating: str = Field("rating", description="Column of the rating.")
    timestamp: str = Field("timestamp", description="Column of the time: a number, a date, or ISO 8601 text.")
    split: str = Field("split", description="Column that says train, valid or test.")
    unknown_items: Literal["drop", "error"] = Field(
        "drop",
        description="Interactions with items that the items table does not list: dropped and counted, or an "
        "error.",
    )

    @model_validator(mode="after")
    def _one_kind_of_pictures(self) -> TablesConfig:
        if self.image_extension and self.image not in {"", "image"}:
            raise ValueError(
                "give either image (a column) or image_extension (files named by item id), not both"
            )
        return self

    def optional(self, setting: str, table: pl.DataFrame) -> str:
        """The column of an optional setting; "" for none: empty, or of default name and not there."""
        column: str = getattr(self, setting)
        is_default = column == type(self).model_fields[setting].default
        return "" if is_default and column not in table.columns else column


def tables_identity(config: TablesConfig) -> JsonValue:
    """Settings and bytes of both tables, the pictures they name, and where those lie if they stay there."""
    images = read_items(config)["image"].drop_nulls().to_list()
    digest = hashlib.sha256("\n".join(images).encode())
    if config.picture_identity:
        for looked in look_at_pictures(_image_root(config), images, PictureLimits()):
            digest.update(f"{looked.digest}\n".encode())
    return {
        **config.model_dump(mode="json", exclude={"items", "interactions", "image_folder"}),
        "items_sha256": file_sha256(source_file("tables.items", config.items)),
        "interactions_sha256": file_sha256(source_file("tables.interactions", config.interactions)),
        "pictures_sha256": digest.hexdigest(),
        "image_root": "" if config.copy_pictures else _image_root(config),
    }


def import_tables(config: TablesConfig, folder: Path) -> RawDataset:
    """Read both tables.

    Args:
        config: Files and columns.
        folder: Takes the pictures where they are copied.

    Raises:
        DatasetError: A file or column that is not there or not of its kind, repeated item ids, pictures
            outside of their folder, or nothing left.
    """
    drops: dict[str, int] = {}
    items = read_items(config)
    without_id = items["item_id"].is_null()
    drops["items without an id"] = int(without_id.sum())
    items = items.filter(~without_id)

    interactions = _read_interactions(config)
    complete = interactions.filter(pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null())
    drops["interactions without a user or an item"] = len(interactions) - len(complete)
    known = complete["item_id"].is_in(items["item_id"].implode())
    drops["interactions with an unknown item"] = int((~known).sum())
    if config.unknown_items == "error" and not known.all():
        unknown = complete["item_id"].filter(~known).unique(maintain_order=True).to_list()
        raise DatasetError(
            f"{drops['interactions with an unknown item']:,} interactions are with {len(unknown):,} items "
            f"that {config.items} does not list: {few(unknown)}. List them, or set tables.unknown_items to "
            "drop."
        )
    if len(complete) and not known.any():
        raise DatasetError(
            f"No interaction is with an item of {config.items}. It lists "
            f"{few(items['item_id'].to_list(), 3)}; the interactions name "
            f"{few(complete['item_id'].unique(maintain_order=True).to_list(), 3)}. "
            "Look at tables.item_id and tables.interaction_item_id."
        )

    image_root = _image_root(config) if items["image"].count() else ""
    listed = items["image"].drop_nulls().to_list()
    check_inside(image_root, listed)
    if config.copy_pictures and listed:
        _copy(image_root, listed, folder)
        image_root = str(folder)
    drops["items without a picture listed"] = int(items["image"].null_count())
    return RawDataset(
        items=items,
        interactions=complete.filter(known),
        image_root=image_root,
        drops={what: count for what, count in drops.items() if count},
    )


def read_items(config: TablesConfig) -> pl.DataFrame:
    """Read the items: ``item_id``; ``title``, ``description``, ``image`` or null; further columns."""
    table = read_table(source_file("tables.items", config.items))
    columns = {setting: config.optional(setting, table) for setting in ("title", "description", "image")}
    if config.image_extension:
        columns["image"] = ""
    require_columns(
        table,
        {
            "tables.item_id": config.item_id,
            **{f"tables.{setting}": name for setting, name in columns.items()},
        },
        config.items,
    )
    ids = strings(table[config.item_id])
    canonical = [ids.alias("item_id")]
    for setting in ("title", "description"):
        name = columns[setting]
        canonical.append((_text(table[name], f"tables.{setting}") if name else _nulls(table)).alias(setting))
    if config.image_extension:
        images = ids + config.image_extension
        if not is_remote(
            _image_root(config)
        ):  # an item without a file has no picture, which is no mistake here
            root = Path(_image_root(config))
            there = [image is not None and (root / image).is_file() for image in images]
            images = images.set(~pl.Series(there, dtype=pl.Boolean), None)
    else:
        images = strings(table[columns["image"]]) if columns["image"] else _nulls(table)
    canonical.append(images.alias("image"))
    used = {config.item_id, *columns.values(), *(column.name for column in canonical)}
    return pl.DataFrame([*canonical, *(column for column in table if column.name not in used)])


def _read_interactions(config: TablesConfig) -> pl.DataFrame:
    table = read_table(source_file("tables.interactions", config.interactions))
    item_column = config.interaction_item_id or config.item_id
    item_setting = "tables.interaction_item_id" if config.interaction_item_id else "tables.item_id"
    optional = {setting: config.optional(setting, table) for setting in ("rating", "timestamp", "split")}
    require_columns(
        table,
        {
            "tables.user_id": config.user_id,
            item_setting: item_column,
            **{f"tables.{setting}": name for setting, name in optional.items()},
        },
        config.interactions,
    )
    columns = [strings(table[config.user_id]).alias("user_id"), strings(table[item_column]).alias("item_id")]
    readers = {"rating": ratings, "timestamp": seconds, "split": split_labels}
    columns += [readers[setting](table[name]).alias(setting) for setting, name in optional.items() if name]
    return pl.DataFrame(columns)


def ratings(column: pl.Series) -> pl.Series:
    """Ratings as float32; null where there is none.

    Raises:
        DatasetError: A value that is no number.
    """
    converted = column.cast(pl.Float32, strict=False)
    bad = first_bad(column.set(column == "", None) if column.dtype == pl.String else column, converted)
    if bad:
        raise DatasetError(f"The ratings in column {column.name!r} hold {few(bad)}; expected numbers.")
    return converted


def seconds(column: pl.Series) -> pl.Series:
    """Times as int64, null where there is none: dates as Unix seconds, numbers in their unit, rounded down.

    Raises:
        DatasetError: A value that is neither a number nor a date.
    """
    if column.dtype == pl.String:
        values = column.set(column == "", None)
        numbers = values.cast(pl.Float64, strict=False)
        if not first_bad(values, numbers):
            whole = values.cast(pl.Int64, strict=False)  # exact where float64 is not, such as nanoseconds
            return whole if not first_bad(values, whole) else numbers.floor().cast(pl.Int64)
        column = values.str.to_datetime(strict=False, time_zone="UTC").rename(column.name)
        bad = first_bad(values, column)
        if bad:
            raise DatasetError(
                f"The times in column {values.name!r} hold {few(bad)}; expected numbers, or dates such as "
                "2023-05-01T12:30:00."
            )
    if isinstance(column.dtype, pl.Date | pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if not column.dtype.is_numeric():
        raise DatasetError(
            f"The times in column {column.name!r} are {column.dtype}; expected numbers or dates."
        )
    return (column.floor() if column.dtype.is_float() else column).cast(pl.Int64)


def split_labels(column: pl.Series) -> pl.Series:
    """The words of a split column as train, valid, test.

    Raises:
        DatasetError: Another word, or none.
    """
    words = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    labels = words.replace_strict(SPLIT_WORDS, default=None, return_dtype=pl.String)
    bad = column.filter(labels.is_null()).unique(maintain_order=True).to_list()
    if bad:
        raise DatasetError(
            f"The split column {column.name!r} holds {few(bad)}; expected train, valid or test in every row."
        )
    return labels


def _image_root(config: TablesConfig) -> str:
    if is_remote(config.image_folder):
        return config.image_folder
    folder = (
        Path(config.image_folder).expanduser()
        if config.image_folder
        else Path(config.items).expanduser().parent
    )
    return str(folder.absolute())


def _text(column: pl.Series, setting: str) -> pl.Series:
    """A text column: strings, or lists of strings; numbers and categories become strings."""
    if column.dtype in {pl.String, pl.List(pl.String)}:
        return column
    if column.dtype.is_nested():
        raise DatasetError(
            f"Column {column.name!r} ({setting}) is {column.dtype}; expected text or lists of text. "
            "Name another column."
        )
    return column.cast(pl.String)


def _nulls(table: pl.DataFrame) -> pl.Series:
    return pl.Series("", [None] * len(table), dtype=pl.String)


def _copy(image_root: str, images: list[str], folder: Path) -> None:
    """Copy the pictures that are there; those that are not are counted when pictures are hashed."""
    for image in images:
        content = read_picture(image_root, image)
        if content is not None:
            target = folder / image
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
