"""What a run's lists are like beyond accuracy, and for which users and items they are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recommenders.beyond_accuracy import (
    Popularity,
    category_distance,
    group_recall,
    intra_list_distance,
    list_metrics,
)
from recommenders.evaluation import Evaluation, EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Split

CATEGORY_COLUMN = "categories"
"""Column of a dataset's items, strings or lists of strings, that diversity by category is measured on."""
_ACTIVITY = ("low", "middle", "high")

Groups = Mapping[str, NDArray[np.bool_]]


def beyond_accuracy(
    measured: Evaluation, split: Split, table: FeatureTable, items: pl.DataFrame, config: EvaluationConfig
) -> dict[str, float]:
    """Metrics of a part's lists as a whole; see `recommenders.beyond_accuracy` for their meaning.

    Args:
        measured: With lists kept.
        split: Popularity is counted in its training part.
        table: Diversity is measured on each modality's features.
        items: The dataset's items in order.
        config: List lengths.

    Returns:
        `gini@20` and so on, `ild_<modality>@20`, and `ild_categories@20` where items have categories.
    """
    assert measured.lists is not None  # noqa: S101 - the caller kept them
    lists = measured.lists
    found = _of_exposure(measured, split, config)
    for modality in table.modalities:
        for k in config.ks:
            distances = intra_list_distance(lists, table.vectors[modality], table.present[modality], k)
            found[f"ild_{modality}@{k}"] = _mean(distances)
    if CATEGORY_COLUMN in items.columns:
        categories = _categories(items[CATEGORY_COLUMN])
        for k in config.ks:
            found[f"ild_categories@{k}"] = _mean(category_distance(lists, categories, k))
    return _finite(found)


def exposure(measured: Evaluation, split: Split, config: EvaluationConfig) -> dict[str, float]:
    """Metrics of which items a part's lists show, `gini@20` and so on, without those of diversity.

    They take milliseconds, as no feature is looked at.
    """
    return _finite(_of_exposure(measured, split, config))


def _of_exposure(measured: Evaluation, split: Split, config: EvaluationConfig) -> dict[str, float]:
    assert measured.lists is not None  # noqa: S101 - the caller kept them
    assert measured.hits is not None  # noqa: S101 - as above
    assert measured.relevant is not None  # noqa: S101 - as above
    relevant_counts = np.bincount(measured.relevant.item_rows, minlength=split.train.n_items)
    return list_metrics(measured.lists, measured.hits, relevant_counts, _popularity(split), config.ks)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if np.isfinite(value)}


def by_group(
    measured: Evaluation, split: Split, table: FeatureTable, config: EvaluationConfig
) -> pl.DataFrame:
    """Test metrics of groups: users by activity; items by popularity, by having been trained on, by modality.

    Returns:
        Columns grouping, group, n_users, n_items, metric, value. Of groups of users all user metrics, of
        groups of items the recall of their relevant items.
    """
    assert measured.lists is not None  # noqa: S101 - the caller kept them
    assert measured.hits is not None  # noqa: S101 - as above
    assert measured.relevant is not None  # noqa: S101 - as above
    rows: list[dict[str, object]] = []
    activity = np.bincount(split.train.user_rows, minlength=split.train.n_users)
    users = measured.per_user["user_row"].to_numpy()
    for name, members in _thirds(activity[users]).items():
        part = measured.per_user.filter(pl.Series(members))
        for metric in measured.per_user.columns[1:]:
            value = float(part[metric].mean()) if len(part) else float("nan")  # type: ignore[arg-type]  # floats
            rows.append(_row(("user activity", name), (len(part), 0), metric, value))
    place = np.full(split.train.n_users, -1)
    place[users] = np.arange(len(users))
    relevant = (place[measured.relevant.user_rows], measured.relevant.item_rows)
    for grouping, groups in item_groups(split, table).items():
        for k in config.ks:
            found = group_recall(measured.lists, measured.hits, relevant, groups, k)
            rows += [
                _row((grouping, name), (n_users, n_items), f"recall@{k}", value)
                for name, (value, n_users, n_items) in found.items()
            ]
    schema = {"grouping": pl.String, "group": pl.String, "n_users": pl.Int64, "n_items": pl.Int64}
    return pl.DataFrame(rows, schema=schema | {"metric": pl.String, "value": pl.Float64})


def item_groups(split: Split, table: FeatureTable) -> dict[str, Groups]:
    """Groupings of the items: by popularity, warm and cold, and by which modalities they have."""
    popularity = _popularity(split)
    warm = popularity.counts > 0
    groupings: dict[str, Groups] = {
        "item popularity": {"head": ~popularity.is_tail, "tail": popularity.is_tail},
        "item training": {"warm": warm, "cold": ~warm},
    }
    for modality in table.modalities:
        present = table.present[modality].cpu().numpy()
        groupings[f"item {modality}"] = {"present": present, "absent": ~present}
    return groupings


def _popularity(split: Split) -> Popularity:
    counts = np.bincount(split.train.item_rows, minlength=split.train.n_items)
    return Popularity.of(counts, int(np.unique(split.train.user_rows).size))


def _thirds(activity: NDArray[np.integer]) -> Groups:
    """Users by the terciles of their training interactions; equal activity, equal group."""
    bounds = np.quantile(activity, [1 / 3, 2 / 3]) if len(activity) else np.zeros(2)
    group = np.searchsorted(bounds, activity, side="left")
    return {name: group == number for number, name in enumerate(_ACTIVITY)}


def _categories(column: pl.Series) -> Sequence[frozenset[str]]:
    values = column.to_list()
    return [
        frozenset([value] if isinstance(value, str) else value) if value else frozenset() for value in values
    ]


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def _row(group: tuple[str, str], sizes: tuple[int, int], metric: str, value: float) -> dict[str, object]:
    row: dict[str, object] = {"grouping": group[0], "group": group[1], "n_users": sizes[0]}
    return row | {"n_items": sizes[1], "metric": metric, "value": value}
