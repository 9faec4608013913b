"""From artefacts to what a recommender takes: interactions, a split, and a feature table in item order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, Field

from features.catalogue import Catalogue
from features.feature_table import FeatureSet, fill_absent, normalise
from pipeline.errors import DatasetError
from pipeline.store import Artefact
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split

SPLIT_LABELS = ("train", "valid", "test")
"""The names of the parts in ``interactions.parquet``; a label's place is its number in ``splitting``."""
OWN_IMAGES = "images"
"""The folder of a dataset artefact that holds its own pictures, and its ``image_root`` where it does."""


class ReadingConfig(BaseModel, frozen=True, extra="forbid"):
    """How cached features are turned into a recommender's input; part of a run's key."""

    absent: Literal["zero", "mean"] = Field(
        "zero", description="What stands in for an absent row: zeros, or the mean of the present rows."
    )
    normalise: Literal["none", "l2", "standardise"] = Field(
        "l2", description="Rows to unit length, columns to zero mean and unit variance, or nothing."
    )


@dataclass(frozen=True)
class Dataset:
    """A dataset artefact, read."""

    item_ids: list[str]
    user_ids: list[str]
    split: Split


def read_catalogue(dataset: Artefact) -> Catalogue:
    """Read the items of a dataset artefact with the place of their pictures."""
    items = pl.read_parquet(dataset.path("items.parquet"))
    root = str(dataset.manifest.facts.get("image_root", ""))
    if root == OWN_IMAGES:
        root = f"{dataset.folder_url}/{OWN_IMAGES}"
    return Catalogue(items=items, image_root=root)


def read_dataset(dataset: Artefact) -> Dataset:
    """Read ids, interactions and split of a dataset artefact."""
    item_ids = pl.read_parquet(dataset.path("items.parquet"), columns=["item_id"])["item_id"].to_list()
    user_ids = pl.read_parquet(dataset.path("users.parquet"), columns=["user_id"])["user_id"].to_list()
    table = pl.read_parquet(dataset.path("interactions.parquet"))
    parts = {label: table.filter(pl.col("split") == label) for label in SPLIT_LABELS}

    def interactions(part: pl.DataFrame) -> Interactions:
        return Interactions(
            user_rows=part["user_row"].to_numpy().astype(np.int64),
            item_rows=part["item_row"].to_numpy().astype(np.int64),
            n_users=len(user_ids),
            n_items=len(item_ids),
        )

    split = Split(
        train=interactions(parts["train"]),
        valid=interactions(parts["valid"]),
        test=interactions(parts["test"]),
        rule=str(dataset.manifest.facts.get("split_rule", "given")),
    )
    return Dataset(item_ids=item_ids, user_ids=user_ids, split=split)


def read_feature_table(
    features: Mapping[str, Artefact], item_ids: Sequence[str], config: ReadingConfig
) -> FeatureTable:
    """Join feature artefacts by item id, fill what is absent and normalise.

    Args:
        features: Modality -> feature artefact.
        item_ids: The dataset's items, in order.
        config: How absent rows are filled and rows normalised.

    Raises:
        DatasetError: A feature artefact holds no row at all for these items: it belongs to other items.
    """
    vectors: dict[str, torch.Tensor] = {}
    present: dict[str, torch.Tensor] = {}
    for modality, artefact in features.items():
        stored = FeatureSet.read(artefact.paths("part-*.parquet"))
        wanted = pl.Series("item_id", item_ids, dtype=pl.String)
        missing = wanted.filter(~wanted.is_in(stored.item_ids.implode()))
        if len(missing):
            raise DatasetError(
                f"{artefact.ref} covers {len(wanted) - len(missing):,} of {len(wanted):,} items of this "
                f"dataset, first missing {missing[0]!r}; run `tandem extract` on this dataset."
            )
        aligned, has = stored.align(wanted)
        if not bool(has.any()):
            raise DatasetError(
                f"{artefact.ref} has no usable row for any of the {len(wanted):,} items; look at the columns "
                "status and reason of its parts, mend the files and run `tandem extract --retry-failed`."
            )
        aligned = normalise(aligned, has, config.normalise)
        vectors[modality] = fill_absent(aligned, has, config.absent)
        present[modality] = has
    return FeatureTable(vectors=vectors, present=present)


def given_features_file(modality: str) -> str:
    """Name, in a dataset artefact, of the features that came with it: (I, F) float32 in item order."""
    return f"given_{modality}.npy"
