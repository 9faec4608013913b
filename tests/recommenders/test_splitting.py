"""Each rule's counts and guarantees, the published sizes, and what cannot be split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recommenders.errors import SplitError
from recommenders.interactions import Interactions, Split
from recommenders.splitting import (
    RULES,
    TEST,
    TRAIN,
    VALID,
    SplitConfig,
    SplitRule,
    split_by_labels,
    split_interactions,
    split_labels,
)
from tests.worlds import interactions_of, random_world

PER_USER_RULES = ("ratio_mmrec", "ratio_lattice", "leave_one_out", "leave_last_out", "user_time")


def users_with(counts: list[int], seed: int = 0) -> Interactions:
    """User u has ``counts[u]`` pairs with random items at random times, in a shuffled order of rows."""
    rng = np.random.default_rng(seed)
    n_items = max(counts) + 5
    users = np.repeat(np.arange(len(counts)), counts)
    items = np.concatenate([rng.permutation(n_items)[:count] for count in counts])
    order = rng.permutation(len(users))
    return Interactions(users[order], items[order], len(counts), n_items, rng.integers(0, 40, len(users)))


def counts_of(interactions: Interactions, config: SplitConfig) -> list[tuple[int, int, int]]:
    """(train, valid, test) pairs of each user."""
    labels = split_labels(interactions, config)
    table = np.zeros((interactions.n_users, 3), dtype=int)
    np.add.at(table, (interactions.user_rows, labels), 1)
    return [tuple(row) for row in table.tolist()]


def parts_of(split: Split) -> list[Interactions]:
    return [split.train, split.valid, split.test]


# --- every rule -------------------------------------------------------------------------------------------


def test_every_rule_that_can_be_named_exists() -> None:
    assert set(get_args(SplitRule)) == set(RULES) | {"given"}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_parts_add_up_and_never_overlap(rule: SplitRule) -> None:
    pairs = random_world(n_users=60).interactions
    split = split_interactions(pairs, SplitConfig(rule=rule))
    keys = np.concatenate([part.keys() for part in parts_of(split)])
    assert np.sort(keys).tolist() == pairs.keys().tolist()
    assert split.rule == rule
    assert min(len(part) for part in parts_of(split)) > 0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_shuffled_file_splits_alike(rule: SplitRule) -> None:
    pairs = random_world(n_users=60).interactions
    shuffled = pairs.take(np.random.default_rng(5).permutation(len(pairs)))
    config = SplitConfig(rule=rule, seed=3)
    assert split_interactions(pairs, config).fingerprint == split_interactions(shuffled, config).fingerprint


@pytest.mark.parametrize("rule", ["ratio_mmrec", "ratio_lattice", "leave_one_out", "cold_items"])
def test_drawn_splits_follow_their_seed(rule: SplitRule) -> None:
    pairs = random_world(n_users=60).interactions
    prints = [split_interactions(pairs, SplitConfig(rule=rule, seed=seed)).fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("rule", ["user_time", "global_time", "leave_last_out"])
def test_splits_by_time_need_no_seed(rule: SplitRule) -> None:
    pairs = random_world(n_users=60).interactions
    prints = {split_interactions(pairs, SplitConfig(rule=rule, seed=seed)).fingerprint for seed in (1, 2)}
    assert len(prints) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(any),
    st.sampled_from(PER_USER_RULES),
    st.sampled_from([(0.1, 0.1), (0.2, 0.1), (0.05, 0.3), (0.49, 0.5)]),
)
def test_no_user_rule_leaves_a_user_without_training_or_holds_out_one_part_only(
    counts: list[int], rule: SplitRule, shares: tuple[float, float]
) -> None:
    config = SplitConfig(rule=rule, valid_share=shares[0], test_share=shares[1])
    for count, (train, valid, test) in zip(counts, counts_of(users_with(counts), config), strict=True):
        assert train + valid + test == count
        assert train >= 1 or count == 0
        if count >= 3:
            assert valid >= 1
            assert test >= 1


# --- published rules --------------------------------------------------------------------------------------


def test_mmrec_gives_test_the_odd_pair_and_small_users_one_of_each() -> None:
    counts = [1, 2, 3, 5, 9, 10, 14, 15, 19, 20, 25]
    assert counts_of(users_with(counts), SplitConfig(rule="ratio_mmrec")) == [
        (1, 0, 0),
        (2, 0, 0),
        (1, 1, 1),
        (3, 1, 1),
        (7, 1, 1),
        (8, 1, 1),
        (12, 1, 1),
        (12, 1, 2),
        (16, 1, 2),
        (16, 2, 2),
        (20, 2, 3),
    ]


def test_lattice_gives_validation_the_odd_pair() -> None:
    counts = [5, 15, 20, 25]
    expected = [(3, 1, 1), (12, 2, 1), (16, 2, 2), (20, 3, 2)]
    assert counts_of(users_with(counts), SplitConfig(rule="ratio_lattice")) == expected


@pytest.mark.parametrize(("rule", "odd"), [("ratio_mmrec", "test"), ("ratio_lattice", "valid")])
def test_unequal_shares_are_rounded_like_equal_ones(rule: SplitRule, odd: str) -> None:
    # 20% + 10% of 45 is 13.5, so 13 are held out: validation's share of them is 8.67, test's 4.33.
    config = SplitConfig(rule=rule, valid_share=0.2, test_share=0.1)
    assert counts_of(users_with([45]), config) == [(32, 8, 5) if odd == "test" else (32, 9, 4)]


def test_shares_are_meant_as_decimals() -> None:
    # 0.1 + 0.2 is 0.30000000000000004 and 0.29 * 100 is 28.999999999999996 in binary.
    assert counts_of(users_with([100]), SplitConfig(valid_share=0.145, test_share=0.145))[0][0] == 71
    pairs = users_with([50, 50])
    split = split_interactions(pairs, SplitConfig(rule="global_time", valid_share=0.29, test_share=0.29))
    assert [len(part) for part in parts_of(split)] == [42, 29, 29]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("rule", "sizes"),
    [("ratio_mmrec", (118_551, 20_559, 21_682)), ("ratio_lattice", (118_551, 21_682, 20_559))],
)
def test_amazon_baby_has_the_published_sizes(
    real_data: Callable[[str], Path], rule: SplitRule, sizes: tuple[int, int, int]
) -> None:
    users: list[int] = []
    items: list[int] = []
    for part in ("train", "val", "test"):
        for user, liked in json.loads(
            (real_data("amazon-baby") / "5-core" / f"{part}.json").read_text()
        ).items():
            users += [int(user)] * len(liked)
            items += liked
    pairs = Interactions(np.array(users), np.array(items), 19_445, 7_050)
    assert len(pairs) == 160_792
    split = split_interactions(pairs, SplitConfig(rule=rule))
    assert tuple(len(part) for part in parts_of(split)) == sizes
    assert split.summary()["users_without_train"] == 0


def test_every_pair_of_a_user_is_as_likely_to_be_held_out_as_any_other() -> None:
    pairs = users_with([10])
    test_items = Counter(
        int(split_interactions(pairs, SplitConfig(rule="leave_one_out", seed=seed)).test.item_rows[0])
        for seed in range(600)
    )
    assert set(test_items) == set(pairs.item_rows.tolist())
    assert max(test_items.values()) < 100  # 60 expected, standard deviation 7.3


# --- time -------------------------------------------------------------------------------------------------


def test_user_time_holds_out_each_users_latest_pairs_with_test_last() -> None:
    pairs = users_with([3, 12, 20, 1])
    split = split_interactions(pairs, SplitConfig(rule="user_time"))
    for user in range(3):
        spans = []
        for part in parts_of(split):
            assert part.timestamps is not None
            times = part.timestamps[part.user_rows == user]
            spans.append((times.min(), times.max()))
        assert spans[0][1] <= spans[1][0]
        assert spans[1][1] <= spans[2][0]


def test_equal_times_of_a_user_go_by_item_row() -> None:
    pairs = interactions_of([(0, 2), (0, 0), (0, 3), (0, 1)], 1, 4, timestamps=[7, 7, 7, 7])
    for rule in ("user_time", "leave_last_out"):
        split = split_interactions(pairs, SplitConfig(rule=rule))
        assert [sorted(part.item_rows.tolist()) for part in parts_of(split)] == [[0, 1], [2], [3]]


def test_leave_last_out_takes_the_latest_pair_for_test_and_the_one_before_for_validation() -> None:
    pairs = interactions_of(
        [(0, 2), (0, 0), (0, 1), (1, 1), (1, 0), (2, 2)], 3, 3, timestamps=[5, 9, 7, 4, 3, 1]
    )
    split = split_interactions(pairs, SplitConfig(rule="leave_last_out"))
    assert list(zip(split.test.user_rows.tolist(), split.test.item_rows.tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
    ]
    assert list(zip(split.valid.user_rows.tolist(), split.valid.item_rows.tolist(), strict=True)) == [(0, 1)]


def test_global_time_trains_on_nothing_later_than_what_is_held_out_and_counts_newcomers() -> None:
    pairs = interactions_of(
        [(0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (2, 1), (1, 3), (2, 0), (0, 3), (3, 4)],
        n_users=4,
        n_items=5,
        timestamps=list(range(10)),
    )
    split = split_interactions(pairs, SplitConfig(rule="global_time", valid_share=0.2, test_share=0.2))
    times = [part.timestamps.tolist() for part in parts_of(split) if part.timestamps is not None]
    assert times == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]
    summary = split.summary()
    assert summary["test_pairs_of_cold_users"] == 1  # user 3
    assert summary["test_pairs_of_cold_items"] == 2  # items 3 and 4
    assert summary["valid_pairs_of_cold_items"] == 1


def test_equal_times_of_all_go_by_user_then_item() -> None:
    pairs = interactions_of([(1, 1), (0, 1), (1, 0), (0, 0)], 2, 2, timestamps=[3] * 4)
    split = split_interactions(pairs, SplitConfig(rule="global_time", valid_share=0.25, test_share=0.25))
    assert (split.valid.user_rows.tolist(), split.valid.item_rows.tolist()) == ([1], [0])
    assert (split.test.user_rows.tolist(), split.test.item_rows.tolist()) == ([1], [1])


@pytest.mark.parametrize("rule", ["user_time", "global_time", "leave_last_out"])
def test_time_rules_without_times_name_the_column_to_give(rule: SplitRule) -> None:
    pairs = interactions_of([(0, 0), (0, 1), (0, 2)], 1, 3)
    with pytest.raises(SplitError, match=f"{rule}.*needs times.*column 'timestamp'.*ratio_mmrec"):
        split_interactions(pairs, SplitConfig(rule=rule))


# --- cold items -------------------------------------------------------------------------------------------


def test_cold_items_are_in_one_part_only_and_validation_has_its_own() -> None:
    pairs = random_world(n_users=50, n_items=43).interactions
    split = split_interactions(pairs, SplitConfig(rule="cold_items", valid_share=0.1, test_share=0.2))
    items = [set(part.item_rows.tolist()) for part in parts_of(split)]
    assert [len(part) for part in items] == [43 - 4 - 8, 4, 8]
    assert not items[TRAIN] & items[VALID]
    assert not items[TRAIN] & items[TEST]
    assert not items[VALID] & items[TEST]
    assert split.summary()["test_pairs_of_cold_items"] == len(split.test)


def test_items_without_pairs_are_not_drawn_as_cold_items() -> None:
    pairs = interactions_of([(0, 3), (0, 50), (1, 97), (1, 3)], n_users=2, n_items=100)
    split = split_interactions(pairs, SplitConfig(rule="cold_items"))
    assert [len(set(part.item_rows.tolist())) for part in parts_of(split)] == [1, 1, 1]


# --- given labels and refusals ----------------------------------------------------------------------------


def test_given_labels_are_taken_as_they_are() -> None:
    pairs = interactions_of([(0, 0), (0, 1), (1, 2), (0, 2)], 2, 3)
    split = split_interactions(pairs, SplitConfig(rule="given"), np.array([2, 0, 1, 0]))
    assert [part.item_rows.tolist() for part in parts_of(split)] == [[1, 2], [2], [0]]


def test_given_split_without_labels_and_with_foreign_labels_is_refused() -> None:
    pairs = interactions_of([(0, 0), (0, 1), (0, 2)], 1, 3)
    with pytest.raises(SplitError, match=r"needs the data's own split.*Name the column"):
        split_interactions(pairs, SplitConfig(rule="given"))
    with pytest.raises(SplitError, match="holds label 7; expected 0"):
        split_interactions(pairs, SplitConfig(rule="given"), np.array([0, 1, 7]))
    with pytest.raises(ValueError, match="2 labels for 3 interactions"):
        split_interactions(pairs, SplitConfig(rule="given"), np.array([0, 1]))


def test_a_part_without_pairs_is_refused_by_name() -> None:
    pairs = interactions_of([(0, 0), (0, 1), (1, 0)], 2, 2)
    with pytest.raises(
        SplitError, match=r"'ratio_mmrec' leaves no valid pairs of 3 interactions.*larger share"
    ):
        split_interactions(pairs, SplitConfig())
    with pytest.raises(SplitError, match="leaves no train pairs"):
        split_interactions(interactions_of([(0, 0), (0, 1)], 1, 2), SplitConfig(rule="cold_items"))
    with pytest.raises(SplitError, match="leaves no test pairs"):
        split_by_labels(pairs, np.array([0, 1, 0], np.int8), "given")
    with pytest.raises(SplitError, match="no interactions to split"):
        split_interactions(interactions_of([], 1, 1), SplitConfig())


def test_a_pair_in_two_parts_is_refused_and_repeats_within_one_part_are_not() -> None:
    pairs = interactions_of([(0, 0), (0, 1), (0, 2), (0, 0)], 1, 3)
    with pytest.raises(SplitError, match=r"1 of 3 user-item pairs are in two parts.*filter of duplicates"):
        split_interactions(pairs, SplitConfig(rule="given"), np.array([0, 1, 2, 2]))
    assert len(split_interactions(pairs, SplitConfig(rule="given"), np.array([0, 1, 2, 0])).train) == 2


def test_shares_that_leave_no_training_are_refused() -> None:
    with pytest.raises(ValidationError, match="expected below 1"):
        SplitConfig(valid_share=0.5, test_share=0.5)
    with pytest.raises(ValidationError):
        SplitConfig(valid_share=0)
    with pytest.raises(ValidationError):
        SplitConfig.model_validate({"rule": "ratio"})
