"""Filters: what is kept, in which order, and that each drop is counted."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.base import RawDataset
from pipeline.datasets.filters import FilterConfig, apply_filters, k_core
from pipeline.errors import DatasetError


def dataset(
    pairs: list[tuple[str, str]],
    ratings: list[float | None] | None = None,
    timestamps: list[int | None] | None = None,
    item_ids: list[str] | None = None,
) -> RawDataset:
    table = pl.DataFrame(
        {"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]},
        schema={"user_id": pl.String, "item_id": pl.String},
    )
    if ratings is not None:
        table = table.with_columns(pl.Series("rating", ratings, dtype=pl.Float32))
    if timestamps is not None:
        table = table.with_columns(pl.Series("timestamp", timestamps, dtype=pl.Int64))
    listed = item_ids or sorted({item for _, item in pairs})
    return RawDataset(pl.DataFrame({"item_id": listed}), table)


def rows(filtered: RawDataset) -> list[tuple[object, ...]]:
    return filtered.interactions.rows()


def test_without_settings_everything_stays_and_nothing_is_counted() -> None:
    raw = dataset([("u", "a"), ("v", "b")], item_ids=["b", "a", "never seen"])
    filtered = apply_filters(raw, FilterConfig())
    assert rows(filtered) == rows(raw)
    assert filtered.items["item_id"].to_list() == ["b", "a", "never seen"]
    assert filtered.drops == {}


@pytest.mark.parametrize(("rule", "kept"), [("keep_first", [4.0, 1.0]), ("keep_last", [1.0, 5.0])])
def test_repeated_pairs_are_decided_by_time_not_by_place(rule: str, kept: list[float]) -> None:
    raw = dataset([("u", "a"), ("u", "b"), ("u", "a")], ratings=[5.0, 1.0, 4.0], timestamps=[30, 20, 10])
    filtered = apply_filters(raw, FilterConfig.model_validate({"duplicates": rule}))
    assert sorted(filtered.interactions["rating"].to_list()) == sorted(kept)
    assert filtered.drops == {f"repeated interactions ({rule})": 1}


@pytest.mark.parametrize(("rule", "kept"), [("keep_first", [5.0, 1.0]), ("keep_last", [1.0, 4.0])])
def test_repeated_pairs_without_times_are_decided_by_place(rule: str, kept: list[float]) -> None:
    raw = dataset([("u", "a"), ("u", "b"), ("u", "a")], ratings=[5.0, 1.0, 4.0])
    filtered = apply_filters(raw, FilterConfig.model_validate({"duplicates": rule}))
    assert filtered.interactions["rating"].to_list() == kept


def test_an_unknown_time_never_replaces_a_known_one() -> None:
    raw = dataset([("u", "a"), ("u", "a")], ratings=[5.0, 1.0], timestamps=[30, None])
    filtered = apply_filters(raw, FilterConfig(duplicates="keep_last"))
    assert filtered.interactions["rating"].to_list() == [5.0]


def test_repeated_pairs_can_be_kept_or_refused() -> None:
    raw = dataset([("u", "a"), ("u", "a")])
    assert len(apply_filters(raw, FilterConfig(duplicates="keep_all")).interactions) == 2
    with pytest.raises(DatasetError, match=r"1 interactions repeat .*keep_first"):
        apply_filters(raw, FilterConfig(duplicates="error"))


def test_a_users_latest_rating_decides_before_low_ratings_go() -> None:
    raw = dataset([("u", "a"), ("u", "b"), ("u", "a")], ratings=[5.0, 4.0, 1.0], timestamps=[1, 2, 3])
    filtered = apply_filters(raw, FilterConfig(duplicates="keep_last", min_rating=4))
    assert filtered.interactions["item_id"].to_list() == ["b"]


def test_low_and_absent_ratings_are_counted_apart() -> None:
    raw = dataset([("u", item) for item in "abcd"], ratings=[4.0, 3.5, None, float("nan")])
    filtered = apply_filters(raw, FilterConfig(min_rating=4))
    assert filtered.interactions["item_id"].to_list() == ["a"]
    assert filtered.drops == {"interactions without a rating": 2, "interactions rated below 4": 1}
    assert len(filtered.items) == 4, "without a k-core every listed item stays"


def test_a_minimum_rating_needs_ratings() -> None:
    with pytest.raises(DatasetError, match=r"min_rating is 4, but the interactions have no rating"):
        apply_filters(dataset([("u", "a")]), FilterConfig(min_rating=4))
    with pytest.raises(DatasetError, match=r"highest rating is 3\. Lower"):
        apply_filters(dataset([("u", "a")], ratings=[3.0]), FilterConfig(min_rating=4))
    with pytest.raises(DatasetError, match=r"none has one"):
        apply_filters(dataset([("u", "a")], ratings=[None]), FilterConfig(min_rating=4))


def test_the_core_falls_like_dominoes() -> None:
    # w has one item, so c goes to one user; then v has one item, ... only the square of u, x over a, b stays.
    pairs = [("u", "a"), ("u", "b"), ("x", "a"), ("x", "b"), ("v", "b"), ("v", "c"), ("w", "c")]
    filtered = apply_filters(dataset(pairs), FilterConfig(k_core=2))
    assert rows(filtered) == pairs[:4]
    assert filtered.items["item_id"].to_list() == ["a", "b"]
    assert filtered.drops == {
        "interactions outside of the 2-core": 3,
        "users outside of the 2-core": 2,
        "items outside of the 2-core": 1,
    }


def test_unused_items_stay_where_asked_for() -> None:
    pairs = [("u", "a"), ("u", "b"), ("x", "a"), ("x", "b"), ("v", "c")]
    filtered = apply_filters(dataset(pairs), FilterConfig(k_core=2, keep_unused_items=True))
    assert filtered.items["item_id"].to_list() == ["a", "b", "c"]
    assert "items outside of the 2-core" not in filtered.drops


def test_given_features_stay_with_their_items() -> None:
    pairs = [("u", "a"), ("u", "c"), ("x", "a"), ("x", "c"), ("v", "b")]
    raw = dataset(pairs)
    vectors = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    raw = RawDataset(raw.items, raw.interactions, given_features={"image": vectors})
    filtered = apply_filters(raw, FilterConfig(k_core=2))
    np.testing.assert_array_equal(filtered.given_features["image"], [[1.0], [3.0]])


def test_an_empty_core_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(DatasetError, match=r"3-core of 1 interactions; lower filters\.k_core"):
        apply_filters(dataset([("u", "a")]), FilterConfig(k_core=3))


def plain_core(pairs: set[tuple[str, str]], k: int) -> set[tuple[str, str]]:
    """Drop one poor user or item at a time, in whatever order they come."""
    while True:
        for side in (0, 1):
            count = {
                name: sum(pair[side] == name for pair in pairs) for name in {pair[side] for pair in pairs}
            }
            poor = next((name for name, n in sorted(count.items()) if n < k), None)
            if poor is not None:
                pairs = {pair for pair in pairs if pair[side] != poor}
                break
        else:
            return pairs


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_the_core_is_that_of_a_plain_loop(numbers: set[tuple[int, int]], k: int) -> None:
    pairs = {(f"u{user}", f"i{item}") for user, item in numbers}
    core = k_core(dataset(sorted(pairs)).interactions, k)
    assert set(core.rows()) == plain_core(pairs, k)
