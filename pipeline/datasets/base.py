"""What every importer hands over: items, interactions, where the pictures lie, and what was left out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import DatasetError

SPLIT_NAMES: Final = ("train", "valid", "test")
"""The values of the ``split`` column, where a dataset brings its own split."""

INTERACTION_TYPES: Final[dict[str, pl.DataType]] = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "rating": pl.Float32(),
    "timestamp": pl.Int64(),
    "split": pl.String(),
}
"""Columns of the interactions; the last three only where the source has them."""


@dataclass(frozen=True)
class RawDataset:
    """A dataset as imported: items in the order of their file, interactions in the order of theirs.

    Raises:
        DatasetError: No item, no interaction, a repeated or null item id, an interaction with an item that is
            not listed, or features whose rows are not the items.
    """

    items: pl.DataFrame
    """``item_id`` string, unique; ``image`` string below ``image_root`` or null; any further columns."""
    interactions: pl.DataFrame
    """``user_id``, ``item_id`` strings; ``rating`` float32, ``timestamp`` int64, ``split`` where known."""
    image_root: str = ""
    """Local folder or fsspec URL of the pictures; "" where no item has one."""
    drops: dict[str, int] = field(default_factory=dict)
    """What was left out or is lacking, in words, and how often."""
    given_features: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Modality -> (I, F) features that came with the dataset, row i of item i."""

    def __post_init__(self) -> None:
        """Check what every later step relies on."""
        _check_items(self.items)
        _check_interactions(self.interactions, self.items["item_id"])
        for modality, vectors in self.given_features.items():
            if vectors.ndim != 2 or len(vectors) != len(self.items):
                raise DatasetError(
                    f"The given {modality} features have shape {vectors.shape}; expected one row for each of "
                    f"the {len(self.items):,} items. Bring the features that belong to these items."
                )

    @property
    def has_split(self) -> bool:
        """Whether the dataset brings its own split."""
        return "split" in self.interactions.columns

    def user_ids(self) -> list[str]:
        """All users in the order of their first interaction: the agreed order of users."""
        ids: list[str] = self.interactions["user_id"].unique(maintain_order=True).to_list()
        return ids

    def user_and_item_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the (E,) user rows and (E,) item rows of the interactions in the agreed orders."""
        users = rows_of(self.interactions["user_id"], self.user_ids())
        items = rows_of(self.interactions["item_id"], self.items["item_id"].to_list())
        return users, items


def rows_of(ids: pl.Series, order: Sequence[str]) -> NDArray[np.int64]:
    """Return the (E,) place of each id in ``order``; every id must be there."""
    table = pl.DataFrame({"id": pl.Series(order, dtype=pl.String), "row": np.arange(len(order))})
    joined = pl.DataFrame({"id": ids}).join(table, on="id", how="left", maintain_order="left")
    return joined["row"].to_numpy().astype(np.int64)


def require_columns(table: pl.DataFrame, columns: dict[str, str], source: str) -> None:
    """Check that a table has the columns its settings name.

    Args:
        table: What was read.
        columns: Setting -> column it names; "" names none and is skipped.
        source: The file, for the message.

    Raises:
        DatasetError: A column is not there; the message names near matches, or all columns.
    """
    for setting, column in columns.items():
        if not column or column in table.columns:
            continue
        near = difflib.get_close_matches(
            column.lower(), [name.lower() for name in table.columns], n=1, cutoff=0.5
        )
        found = next((name for name in table.columns if near and name.lower() == near[0]), None)
        hint = f"did you mean {found!r}? Set {setting} to it" if found else f"set {setting} to one of these"
        raise DatasetError(
            f"{source} has no column {column!r} ({setting}); {hint}. "
            f"Its columns are: {', '.join(table.columns)}."
        )


def few(values: Sequence[object], limit: int = 5) -> str:
    """Name the first few of many values, for a message."""
    shown = ", ".join(repr(value) for value in values[:limit])
    return shown + (f" and {len(values) - limit:,} more" if len(values) > limit else "")


def _check_items(items: pl.DataFrame) -> None:
    if not len(items):
        raise DatasetError(
            "The dataset lists no item; expected at least one. Look at the items file and its columns."
        )
    ids = items["item_id"]
    if ids.dtype != pl.String or ids.null_count():
        raise DatasetError(
            f"{ids.null_count():,} of {len(ids):,} items have no id; give every item its own item_id."
        )
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True).to_list()
    if repeated:
        raise DatasetError(
            f"{len(repeated):,} item ids are listed more than once: {few(repeated)}. "
            "Two rows of one item cannot both be right; keep one row of each."
        )


def _check_interactions(interactions: pl.DataFrame, item_ids: pl.Series) -> None:
    if not len(interactions):
        raise DatasetError(
            "The dataset has no interaction left; expected at least one. Look at the interactions file, at "
            "whether its item ids are those of the items, and at the filters."
        )
    for column, dtype in INTERACTION_TYPES.items():
        if column in interactions.columns and interactions.schema[column] != dtype:
            raise DatasetError(f"Interactions: {column} is {interactions.schema[column]}; expected {dtype}.")
    unknown = interactions["item_id"].filter(~interactions["item_id"].is_in(item_ids.implode()))
    if len(unknown):
        raise DatasetError(
            f"{len(unknown):,} interactions are with items that are not listed: "
            f"{few(unknown.unique(maintain_order=True).to_list())}. List them, or drop these interactions."
        )
    if "split" in interactions.columns:
        strange = sorted(set(interactions["split"].unique().to_list()) - set(SPLIT_NAMES), key=str)
        if strange:
            raise DatasetError(f"The split column holds {few(strange)}; expected {', '.join(SPLIT_NAMES)}.")
