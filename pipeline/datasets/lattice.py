"""Importer ``lattice``: the JSON files of LATTICE, which many later papers use, with their split.

A folder such as ``baby`` with ``5-core/train.json``, ``val.json`` and ``test.json`` (user number -> item
numbers), ``user2id.json`` and ``item2id.json`` (id -> number), and perhaps ``image_feat.npy`` and
``text_feat.npy``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import polars as pl
from pydantic import BaseModel, Field, JsonValue

from pipeline.datasets.base import RawDataset, few
from pipeline.datasets.mmrec import FEATURE_FILES
from pipeline.datasets.source_files import (
    file_sha256,
    given_feature_files,
    read_given_features,
    read_json_object,
    source_file,
    source_folder,
)
from pipeline.errors import DatasetError

PARTS: Final = {"train": "train.json", "valid": "val.json", "test": "test.json"}
MAPPINGS: Final = {"user": "user2id.json", "item": "item2id.json"}


class LatticeConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the files lie. Items are in the order of their numbers."""

    folder: str = Field("", description="Folder of the data set, such as `data/baby`.")
    core: str = Field("5-core", description="Folder in it that holds train.json, val.json and test.json.")
    image_features: str = Field(
        FEATURE_FILES["image"], description="Name of the image features; read where the file is there."
    )
    text_features: str = Field(
        FEATURE_FILES["text"], description="Name of the text features; read where the file is there."
    )


def lattice_identity(config: LatticeConfig) -> JsonValue:
    """The bytes of all files that are read."""
    folder = source_folder("lattice.folder", config.folder)
    files = {**_files(config, folder), **_feature_files(config, folder)}
    return {"files_sha256": {role: file_sha256(path) for role, path in files.items()}}


def import_lattice(config: LatticeConfig) -> RawDataset:
    """Read interactions with their split, train first, then valid, then test.

    Raises:
        DatasetError: A file that is not there or not of its kind, or a number that no id has.
    """
    folder = source_folder("lattice.folder", config.folder)
    files = _files(config, folder)
    user_ids, item_ids = (_ids_by_number(files[side]) for side in MAPPINGS)
    parts = [_read_part(files[part]).with_columns(split=pl.lit(part)) for part in PARTS]
    numbered = pl.concat(parts)
    for side, ids in (("user", user_ids), ("item", item_ids)):
        unknown = (
            numbered[side].filter((numbered[side] >= len(ids)) | (numbered[side] < 0)).unique().to_list()
        )
        if unknown:
            raise DatasetError(
                f"{folder / config.core} names {side} numbers that {MAPPINGS[side]} does not have: "
                f"{few(unknown)}. Bring the files of one data set."
            )
    interactions = pl.DataFrame(
        {
            "user_id": pl.Series(user_ids).gather(numbered["user"]),
            "item_id": pl.Series(item_ids).gather(numbered["item"]),
            "split": numbered["split"],
        }
    )
    features = {name: read_given_features(path) for name, path in _feature_files(config, folder).items()}
    return RawDataset(pl.DataFrame({"item_id": item_ids}), interactions, given_features=features)


def _files(config: LatticeConfig, folder: Path) -> dict[str, Path]:
    parts = {
        part: source_file("lattice.core", str(folder / config.core / name)) for part, name in PARTS.items()
    }
    mappings = {side: source_file("lattice.folder", str(folder / name)) for side, name in MAPPINGS.items()}
    return {**parts, **mappings}


def _feature_files(config: LatticeConfig, folder: Path) -> dict[str, Path]:
    return given_feature_files(
        folder, {"image": config.image_features, "text": config.text_features}, FEATURE_FILES
    )


def _ids_by_number(path: Path) -> list[str]:
    """The ids of a mapping id -> number, in the order of their numbers, which must be 0 to n - 1."""
    numbers = read_json_object(path)
    ids: list[str | None] = [None] * len(numbers)
    for name, number in numbers.items():
        if not isinstance(number, int) or not 0 <= number < len(ids) or ids[number] is not None:
            raise DatasetError(
                f"{path} gives {name!r} the number {number!r}; expected each number from 0 to "
                f"{len(ids) - 1} once. Bring the file of this data set."
            )
        ids[number] = name
    return [name for name in ids if name is not None]


def _read_part(path: Path) -> pl.DataFrame:
    """Columns ``user`` and ``item``, int64, in the order of the file."""
    users: list[int] = []
    items: list[int] = []
    for user, listed in read_json_object(path).items():
        whole = isinstance(listed, list) and all(isinstance(item, int) for item in listed)
        if not user.isdecimal() or not isinstance(listed, list) or not whole:
            raise DatasetError(
                f"{path}: {user!r} has {str(listed)[:60]}; expected a user number and item numbers."
            )
        users += [int(user)] * len(listed)
        items += listed
    return pl.DataFrame({"user": users, "item": items}, schema={"user": pl.Int64, "item": pl.Int64})
