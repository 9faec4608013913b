"""From artefacts to what a recommender takes: interactions, a split, and a feature table in item order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import polars as pl
import torch
from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from features.catalogue import Catalogue
from features.feature_table import FeatureSet
from features.fusion import fuse
from features.imputation import Filled, Part, fill_absent, fill_from_neighbours, propagate
from features.transforms import Transform, TransformConfig, fit_transform
from pipeline.errors import DatasetError
from pipeline.store import Artefact
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split

SPLIT_LABELS = ("train", "valid", "test")
"""The names of the parts in ``interactions.parquet``; a label's place is its number in ``splitting``."""
FUSED = "fused"
"""The one modality that is left where several are fused at reading."""
OWN_IMAGES = "images"
"""The folder of a dataset artefact that holds its own pictures, and its ``image_root`` where it does."""


class ReadingConfig(TransformConfig, frozen=True, extra="forbid"):
    """How cached features are turned into a recommender's input; part of a run's key.

    First each modality is transformed, then its absent rows are filled, then the modalities are fused.
    """

    absent: Literal["zero", "mean", "neighbours", "propagate"] = Field(
        "zero",
        description="What stands in for an absent row: zeros; the mean of the present rows; the mean of the "
        "items nearest to it in the other modalities; or what spreads to it from the items that the same "
        "users interacted with in training.",
    )
    absent_neighbours: PositiveInt = Field(10, description="Nearest items whose mean `neighbours` takes.")
    propagate_steps: PositiveInt = Field(
        20, description="Steps of `propagate`, each from items to users and back."
    )
    fuse: Literal["none", "concat", "sum", "mean", "pca"] = Field(
        "none",
        description="Make one modality, `fused`, of all: one after the other, summed, averaged, or their "
        "principal components; none: the recommender joins them.",
    )
    fuse_dim: NonNegativeInt = Field(
        0, description="Components that `fuse: pca` keeps; 0: as many as there are."
    )

    @model_validator(mode="after")
    def _no_idle_fuse_dim(self) -> Self:
        if self.fuse_dim and self.fuse != "pca":
            raise ValueError(
                f"fuse_dim is {self.fuse_dim}, but fuse is {self.fuse}; set fuse to pca, or fuse_dim to 0"
            )
        return self

    def identity(self) -> dict[str, JsonValue]:
        """Return what of these settings goes into a run's key.

        Settings that came later count where they differ from their default, so that runs made before them
        keep their keys.
        """
        every: dict[str, JsonValue] = self.model_dump(mode="json")
        fields = type(self).model_fields
        first = ("absent", "normalise")
        return {
            name: value for name, value in every.items() if name in first or value != fields[name].default
        }


@dataclass(frozen=True)
class Dataset:
    """A dataset artefact, read."""

    item_ids: list[str]
    user_ids: list[str]
    split: Split


@dataclass(frozen=True)
class ChoosingData:
    """What of a dataset artefact choices may be made on: it has no test part to look at."""

    item_ids: list[str]
    train: Interactions
    valid: Interactions


def read_catalogue(dataset: Artefact) -> Catalogue:
    """Read the items of a dataset artefact with the place of their pictures."""
    items = pl.read_parquet(dataset.path("items.parquet"))
    root = str(dataset.manifest.facts.get("image_root", ""))
    if root == OWN_IMAGES:
        inside = dataset.manifest.data_folder  # a remote store keeps the files in a folder of the artefact's
        root = "/".join(part for part in (dataset.folder_url, inside, OWN_IMAGES) if part)
    return Catalogue(items=items, image_root=root)


def read_dataset(dataset: Artefact) -> Dataset:
    """Read ids, interactions and split of a dataset artefact."""
    item_ids, user_ids = _read_ids(dataset)
    parts = _read_parts(dataset, SPLIT_LABELS, len(user_ids), len(item_ids))
    split = Split(**parts, rule=str(dataset.manifest.facts.get("split_rule", "given")))
    return Dataset(item_ids=item_ids, user_ids=user_ids, split=split)


def read_for_choosing(dataset: Artefact) -> ChoosingData:
    """Read training and validation pairs of a dataset artefact; test pairs are left in the file."""
    item_ids, user_ids = _read_ids(dataset)
    return ChoosingData(item_ids, **_read_parts(dataset, SPLIT_LABELS[:2], len(user_ids), len(item_ids)))


def _read_ids(dataset: Artefact) -> tuple[list[str], list[str]]:
    item_ids = pl.read_parquet(dataset.path("items.parquet"), columns=["item_id"])["item_id"].to_list()
    user_ids = pl.read_parquet(dataset.path("users.parquet"), columns=["user_id"])["user_id"].to_list()
    return item_ids, user_ids


def _read_parts(
    dataset: Artefact, labels: Sequence[str], n_users: int, n_items: int
) -> dict[str, Interactions]:
    table = pl.scan_parquet(dataset.path("interactions.parquet"))
    parts = {}
    for label in labels:
        rows = table.filter(pl.col("split") == label).select("user_row", "item_row").collect()
        users, items = (rows[name].to_numpy().astype(np.int64) for name in rows.columns)
        parts[label] = Interactions(users, items, n_users, n_items)
    return parts


@dataclass(frozen=True)
class ReadFeatures:
    """A recommender's input, and how much of it the items really have."""

    table: FeatureTable
    counts: dict[str, JsonValue]
    """Modality, and what all were fused to -> its width and the number of items that have it (``present``),
    were given it (``filled``) and are left with zeros (``zero``)."""
    transforms: dict[str, Transform] = field(default_factory=dict)
    """Modality, before any fusing -> what was done to its present rows."""


def modality_names(modalities: Sequence[str]) -> list[str]:
    """Tell apart several feature sets of one modality: ``image``, ``text``, ``image:2``, as they come."""
    seen: Counter[str] = Counter()
    names = []
    for modality in modalities:
        seen[modality] += 1
        names.append(modality if seen[modality] == 1 else f"{modality}:{seen[modality]}")
    return names


def read_features(
    features: Mapping[str, Artefact],
    item_ids: Sequence[str],
    config: ReadingConfig,
    train: Interactions | None = None,
) -> ReadFeatures:
    """Join feature artefacts by item id, transform them, fill what is absent and fuse.

    Args:
        features: Name in the table, as of :func:`modality_names` -> feature artefact.
        item_ids: The dataset's items, in order.
        config: What is done to the vectors.
        train: The *training* interactions; ``absent: propagate`` needs them, nothing else looks at them.

    Raises:
        DatasetError: A feature artefact holds no row at all for these items: it belongs to other items.
        FeatureError: More numbers are asked for than there are, or vectors of unequal width are added.
        ValueError: ``absent: propagate`` without the training interactions.
    """
    parts, transforms = {}, {}
    for name, artefact in features.items():
        aligned, has = _align(artefact, item_ids)
        transforms[name] = fit_transform(aligned, has, config, f"{name}, {artefact.ref},")
        parts[name] = Part(transforms[name].apply(aligned, has), has)
    filled = {name: _fill(name, parts, config, train) for name in parts}
    present = {name: part.present for name, part in parts.items()}
    counts: dict[str, JsonValue] = {name: _counts(part, present[name]) for name, part in filled.items()}
    if config.fuse != "none" and parts:
        anything = torch.stack(list(present.values())).any(dim=0)
        lengths: Literal["none", "l2"] = "l2" if config.normalise == "l2" else "none"
        joined = fuse(filled, anything, config.fuse, dim=config.fuse_dim, normalise=lengths)
        filled, present = {FUSED: joined}, {FUSED: anything}
        counts[f"fused by {config.fuse}"] = _counts(joined, anything)
    table = FeatureTable(vectors={name: part.vectors for name, part in filled.items()}, present=present)
    return ReadFeatures(table, counts, transforms)


def _counts(filled: Filled, present: torch.Tensor) -> dict[str, JsonValue]:
    return {
        "width": filled.vectors.shape[1],
        "present": int(present.sum()),
        "filled": int((filled.known & ~present).sum()),
        "zero": int((~filled.known).sum()),
    }


def read_feature_table(
    features: Mapping[str, Artefact],
    item_ids: Sequence[str],
    config: ReadingConfig,
    train: Interactions | None = None,
) -> FeatureTable:
    """Return the table of :func:`read_features`, where nobody asks for its counts."""
    return read_features(features, item_ids, config, train).table


def _align(artefact: Artefact, item_ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an artefact's (I, F) float32 vectors in the order of the items, and (I,) bool: which it has."""
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
    return aligned, has


def _fill(name: str, parts: Mapping[str, Part], config: ReadingConfig, train: Interactions | None) -> Filled:
    """Fill the absent rows of one modality."""
    vectors, present = parts[name]
    if config.absent == "neighbours":
        others = [part for other, part in parts.items() if other != name]
        return fill_from_neighbours(vectors, present, others, config.absent_neighbours)
    if config.absent == "propagate":
        if train is None:
            raise ValueError(
                "absent is propagate, which spreads along the training interactions; pass train."
            )
        return propagate(vectors, present, train.csr(), config.propagate_steps)
    return fill_absent(vectors, present, config.absent)


def given_features_file(modality: str) -> str:
    """Name, in a dataset artefact, of the features that came with it: (I, F) float32 in item order."""
    return f"given_{modality}.npy"
