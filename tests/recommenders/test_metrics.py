"""The metrics against plain loops, and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recommenders.metrics import coverage, metric_names, rank_metrics
from tests.references.metrics import plain_metrics


def one_user(hits: list[int], n_relevant: int, k: int) -> dict[str, float]:
    values = rank_metrics(np.array([hits], dtype=bool), np.array([n_relevant]), [k])
    return {name.split("@")[0]: float(value[0]) for name, value in values.items()}


def test_values_worked_out_by_hand_for_two_hits_of_three_relevant_items() -> None:
    values = one_user([1, 0, 1, 0, 0], n_relevant=3, k=5)
    assert values["recall"] == pytest.approx(2 / 3)
    assert values["precision"] == pytest.approx(2 / 5)
    assert values["hit_rate"] == 1
    assert values["mrr"] == 1
    assert values["map"] == pytest.approx((1 / 1 + 2 / 3) / 3)
    # Gains 1/log2(2) + 1/log2(4) = 1.5; ideally 1 + 0.63093 + 0.5.
    assert values["ndcg"] == pytest.approx(1.5 / 2.1309297535714573)


def test_ideal_list_is_cut_at_k_when_there_are_more_relevant_items() -> None:
    values = one_user([1, 1], n_relevant=10, k=2)
    assert values["ndcg"] == 1
    assert values["map"] == 1
    assert values["precision"] == 1
    assert values["recall"] == pytest.approx(0.2)


def test_a_hit_beyond_k_counts_for_nothing() -> None:
    assert set(one_user([0, 0, 1], n_relevant=1, k=2).values()) == {0.0}


def test_first_hit_at_rank_four_gives_a_quarter_mrr_and_its_discount() -> None:
    values = one_user([0, 0, 0, 1, 0], n_relevant=1, k=5)
    assert values["mrr"] == values["map"] == 0.25
    assert values["ndcg"] == pytest.approx(1 / math.log2(5))


def test_lists_shorter_than_k_keep_k_as_precisions_denominator() -> None:
    values = one_user([1, 1, 0], n_relevant=2, k=10)
    assert values["precision"] == pytest.approx(0.2)
    assert values["recall"] == values["ndcg"] == 1


def test_every_metric_equals_the_plain_loop_at_several_k() -> None:
    rng = np.random.default_rng(0)
    n_users, depth, ks = 60, 20, [1, 3, 10, 20, 25]
    hits = rng.random((n_users, depth)) < rng.random((n_users, 1))
    n_relevant = hits.sum(axis=1) + rng.integers(0, 6, n_users)
    n_relevant = np.maximum(n_relevant, 1)
    values = rank_metrics(hits, n_relevant, ks)
    assert list(values) == metric_names(ks)
    for user in range(n_users):
        found = set(np.flatnonzero(hits[user]).tolist())
        elsewhere = {depth + extra for extra in range(n_relevant[user] - len(found))}
        for k in ks:
            # Items are named by their rank, those not in the list by a number beyond it.
            expected = plain_metrics(range(depth), found | elsewhere, k)
            for name, value in expected.items():
                assert values[name][user] == pytest.approx(value, abs=1e-12), name


def test_coverage_counts_items_whose_best_rank_is_within_k() -> None:
    assert coverage(np.array([1, 3, 9, 2]), [1, 2, 3]) == {
        "coverage@1": 0.25,
        "coverage@2": 0.5,
        "coverage@3": 0.75,
    }


@pytest.mark.parametrize(
    ("hits", "n_relevant", "ks", "message"),
    [
        (np.zeros((2, 3), bool), np.array([1]), [1], "expected \\(U, K\\) and \\(U,\\)"),
        (np.zeros((1, 3), bool), np.array([0]), [1], "leave such users out"),
        (np.ones((1, 3), bool), np.array([2]), [1], "more hits than relevant items"),
        (np.ones((1, 3), bool), np.array([3]), [], "at least 1"),
        (np.ones((1, 3), bool), np.array([3]), [0, 1], "at least 1"),
    ],
)
def test_wrong_shapes_and_counts_are_refused(
    hits: np.ndarray, n_relevant: np.ndarray, ks: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_metrics(hits, n_relevant, ks)
