"""Pairs, their matrix and the split's fingerprint and summary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split
from tests.worlds import interactions_of, random_world, two_clubs


def test_csr_has_a_one_at_each_pair_and_repeated_pairs_once() -> None:
    pairs = interactions_of([(1, 2), (0, 3), (1, 0), (1, 2)], n_users=3, n_items=4)
    expected = np.array([[0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    matrix = pairs.csr()
    np.testing.assert_array_equal(matrix.toarray(), expected)
    assert matrix.has_sorted_indices
    assert len(pairs) == 4
    assert pairs.keys().tolist() == [3, 4, 6]


def test_empty_interactions_give_an_empty_matrix() -> None:
    assert interactions_of([], n_users=2, n_items=3).csr().toarray().tolist() == [[0] * 3] * 2


def test_counts_cover_users_and_items_without_pairs() -> None:
    pairs = interactions_of([(1, 2), (1, 0)], n_users=3, n_items=4)
    assert pairs.items_per_user().tolist() == [0, 2, 0]
    assert pairs.users_per_item().tolist() == [1, 0, 1, 0]


def test_arrays_are_kept_as_int64_and_float32() -> None:
    pairs = Interactions(
        np.array([0, 1], np.int32),
        np.array([1, 0], np.uint8),
        2,
        2,
        np.array([5, 6], np.int32),
        np.array([1, 2]),
    )
    assert pairs.user_rows.dtype == pairs.item_rows.dtype == np.int64
    assert pairs.timestamps is not None
    assert pairs.timestamps.dtype == np.int64
    assert pairs.ratings is not None
    assert pairs.ratings.dtype == np.float32


def test_take_keeps_times_and_ratings_beside_their_pairs() -> None:
    pairs = Interactions(np.arange(3), np.arange(3), 3, 3, np.array([7, 8, 9]), np.array([0.5, 1.5, 2.5]))
    taken = pairs.take(np.array([2, 0]))
    assert taken.user_rows.tolist() == [2, 0]
    assert taken.timestamps is not None
    assert taken.timestamps.tolist() == [9, 7]
    assert taken.ratings is not None
    assert taken.ratings.tolist() == [2.5, 0.5]


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([0, 2], [0, 0], "user_rows holds 0 to 2; expected rows from 0 to 1"),
        ([0, 1], [-1, 0], "item_rows holds -1 to 0; expected rows from 0 to 3"),
        ([0, 1], [1], "item_rows has shape \\(1,\\); expected \\(E,\\) = \\(2,\\)"),
    ],
)
def test_rows_outside_of_the_tables_and_unequal_lengths_are_refused(
    users: list[int], items: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Interactions(np.array(users), np.array(items), n_users=2, n_items=4)


def test_fingerprint_ignores_row_order_dtype_times_and_the_rules_name() -> None:
    split = random_world().split
    shuffled = [
        part.take(np.random.default_rng(1).permutation(len(part)))
        for part in (split.train, split.valid, split.test)
    ]
    narrow = [
        Interactions(
            part.user_rows.astype(np.int32), part.item_rows.astype(">i2"), part.n_users, part.n_items
        )
        for part in shuffled
    ]
    assert Split(*narrow, rule="another").fingerprint == split.fingerprint


def test_fingerprint_changes_with_a_pair_its_part_and_the_sizes() -> None:
    split = two_clubs().split
    swapped = Split(split.train, split.test, split.valid, split.rule)
    first_gone = Split(split.train.take(np.arange(1, len(split.train))), split.valid, split.test, split.rule)
    taller = [
        Interactions(part.user_rows, part.item_rows, part.n_users + 1, part.n_items)
        for part in (split.train, split.valid, split.test)
    ]
    prints = {split.fingerprint, swapped.fingerprint, first_gone.fingerprint}
    assert len(prints | {Split(*taller, rule=split.rule).fingerprint}) == 4


def test_fingerprint_is_the_same_on_every_machine_and_in_every_version() -> None:
    train = interactions_of([(0, 0), (1, 1)], 2, 3)
    valid, test = interactions_of([(0, 1)], 2, 3), interactions_of([(1, 2)], 2, 3)
    # A change of this value orphans every number that was reported with a fingerprint.
    expected = "c629caf79b428226717dd3a8de8ee83ebd337942546e155306c07e2fc4b98479"
    assert Split(train, valid, test, "given").fingerprint == expected


def test_summary_counts_users_and_items_that_training_never_saw() -> None:
    train = interactions_of([(0, 0), (1, 1)], 4, 5)
    valid = interactions_of([(0, 1), (2, 1)], 4, 5)
    test = interactions_of([(0, 3), (2, 0), (1, 4)], 4, 5)
    assert Split(train, valid, test, "given").summary() == {
        "n_users": 4,
        "n_items": 5,
        "n_train": 2,
        "n_valid": 2,
        "n_test": 3,
        "users_without_train": 2,
        "items_without_train": 3,
        "valid_users": 2,
        "valid_pairs_of_cold_users": 1,
        "valid_pairs_of_cold_items": 0,
        "test_users": 3,
        "test_pairs_of_cold_users": 1,
        "test_pairs_of_cold_items": 2,
    }


def test_parts_over_different_numbers_of_items_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one size"):
        Split(
            interactions_of([(0, 0)], 1, 2),
            interactions_of([(0, 1)], 1, 2),
            interactions_of([], 1, 3),
            "given",
        )


def test_feature_table_knows_its_sizes_and_moves_whole() -> None:
    table = two_clubs(n_items=12).features
    assert table.modalities == ("image", "text")
    assert table.dims == {"image": 2, "text": 2}
    assert table.n_items == 12
    assert FeatureTable().n_items == 0
    moved = table.to("meta")
    assert moved.vectors["text"].device.type == moved.present["text"].device.type == "meta"


@pytest.mark.parametrize(
    ("vectors", "present", "message"),
    [
        ({"image": torch.ones(2, 3)}, {}, "expected equal"),
        ({"image": torch.ones(2)}, {"image": torch.ones(2, dtype=torch.bool)}, "expected floats \\(I, F\\)"),
        ({"image": torch.ones(2, 3)}, {"image": torch.ones(3, dtype=torch.bool)}, "expected bool \\(2,\\)"),
        (
            {"image": torch.ones(2, 3), "text": torch.ones(3, 3)},
            {"image": torch.ones(2, dtype=torch.bool), "text": torch.ones(3, dtype=torch.bool)},
            "one item order",
        ),
    ],
)
def test_feature_table_refuses_tables_that_do_not_fit(
    vectors: dict[str, torch.Tensor], present: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureTable(vectors, present)
