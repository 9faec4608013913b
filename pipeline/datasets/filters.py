"""What of a dataset is kept: one interaction per pair, good ratings, and the k-core; each drop is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import polars as pl
from pydantic import BaseModel, Field, NonNegativeInt

from pipeline.datasets.base import RawDataset
from pipeline.errors import DatasetError


class FilterConfig(BaseModel, frozen=True, extra="forbid"):
    """Filters, applied in this order: repeated pairs, then ratings, then the k-core.

    Repeated pairs go first, so that with ``keep_last`` a user's latest rating decides, not the best one.
    """

    duplicates: Literal["keep_first", "keep_last", "keep_all", "error"] = Field(
        "keep_first",
        description="Which interaction stays where a user meets an item again: by time where there are "
        "times, else by place in the file. `keep_all` keeps them, `error` refuses them.",
    )
    min_rating: float = Field(0.0, description="Interactions with a lower rating are dropped; 0 keeps all.")
    k_core: NonNegativeInt = Field(
        0,
        description="Drop users and items with fewer interactions, again and again until none is left; "
        "0 drops nobody, and every listed item stays.",
    )
    keep_unused_items: bool = Field(
        False,
        description="Keep the items that the k-core left without interactions in the catalogue (cold items).",
    )


def apply_filters(dataset: RawDataset, config: FilterConfig) -> RawDataset:
    """Drop what the configuration says and count it in ``drops``; the order of what stays is kept.

    Raises:
        DatasetError: Nothing is left, a minimum rating without ratings, or repeated pairs where they are
            refused.
    """
    drops = dict(dataset.drops)
    interactions = _one_per_pair(dataset.interactions, config, drops)
    interactions = _well_rated(interactions, config, drops)
    filtered = replace(dataset, interactions=interactions)
    if config.k_core:
        filtered = _core(filtered, config, drops)
    return replace(filtered, drops={what: count for what, count in drops.items() if count})


def k_core(interactions: pl.DataFrame, k: int) -> pl.DataFrame:
    """Return the largest part in which every user and every item has at least ``k`` interactions.

    Users and items are dropped in turn until a round drops nothing; whose turn is first does not matter.
    """
    while True:
        before = len(interactions)
        for side in ("user_id", "item_id"):
            interactions = interactions.filter(pl.len().over(side) >= k)
        if len(interactions) == before:
            return interactions


def _one_per_pair(interactions: pl.DataFrame, config: FilterConfig, drops: dict[str, int]) -> pl.DataFrame:
    if config.duplicates == "keep_all":
        return interactions
    numbered = interactions.with_row_index("_place")
    by_time = ["timestamp", "_place"] if "timestamp" in interactions.columns else ["_place"]
    keep: Literal["first", "last"] = "last" if config.duplicates == "keep_last" else "first"
    kept = (
        numbered.sort(
            by_time
        )  # a null time sorts first: an interaction of unknown time never replaces a known one
        .unique(["user_id", "item_id"], keep=keep, maintain_order=True)
        .sort("_place")
        .drop("_place")
    )
    n_repeated = len(interactions) - len(kept)
    if n_repeated and config.duplicates == "error":
        raise DatasetError(
            f"{n_repeated:,} interactions repeat a user and an item; filters.duplicates is `error`. "
            "Set it to keep_first, keep_last or keep_all."
        )
    drops[f"repeated interactions ({config.duplicates})"] = n_repeated
    return kept


def _well_rated(interactions: pl.DataFrame, config: FilterConfig, drops: dict[str, int]) -> pl.DataFrame:
    if not config.min_rating:
        return interactions
    if "rating" not in interactions.columns:
        raise DatasetError(
            f"filters.min_rating is {config.min_rating:g}, but the interactions have no rating. "
            "Name the rating column, or set filters.min_rating to 0."
        )
    rated = interactions.filter(pl.col("rating").is_not_nan())  # drops null, too
    kept = rated.filter(pl.col("rating") >= config.min_rating)
    drops["interactions without a rating"] = len(interactions) - len(rated)
    drops[f"interactions rated below {config.min_rating:g}"] = len(rated) - len(kept)
    if not len(kept):
        highest = (
            f"the highest rating is {rated['rating'].to_numpy().max():g}" if len(rated) else "none has one"
        )
        raise DatasetError(
            f"No interaction is rated {config.min_rating:g} or better; {highest}. Lower filters.min_rating."
        )
    return kept


def _core(dataset: RawDataset, config: FilterConfig, drops: dict[str, int]) -> RawDataset:
    before = dataset.interactions
    core = k_core(before, config.k_core)
    if not len(core):
        raise DatasetError(
            f"No interaction is left in the {config.k_core}-core of {len(before):,} interactions; "
            "lower filters.k_core or filters.min_rating."
        )
    drops[f"interactions outside of the {config.k_core}-core"] = len(before) - len(core)
    drops[f"users outside of the {config.k_core}-core"] = _lost(before, core, "user_id")
    if config.keep_unused_items:
        return replace(dataset, interactions=core)
    keep = dataset.items["item_id"].is_in(core["item_id"].unique().implode())
    drops[f"items outside of the {config.k_core}-core"] = int((~keep).sum())
    mask = keep.to_numpy()
    return replace(
        dataset,
        items=dataset.items.filter(keep),
        interactions=core,
        given_features={name: vectors[mask] for name, vectors in dataset.given_features.items()},
    )


def _lost(before: pl.DataFrame, after: pl.DataFrame, column: str) -> int:
    return before[column].n_unique() - after[column].n_unique()
