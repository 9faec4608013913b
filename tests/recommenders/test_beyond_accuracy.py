"""Exposure, popularity, novelty, diversity and fairness against plain loops and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recommenders.beyond_accuracy import (
    Popularity,
    category_distance,
    gini,
    group_recall,
    intra_list_distance,
    list_metric_names,
    list_metrics,
    popreo,
)

LISTS = np.array([[0, 2, 4], [1, 0, -1], [3, 4, 2]])
HITS = np.array([[True, False, True], [False, False, False], [False, True, False]])
COUNTS = np.array([6, 2, 1, 1, 0])
RELEVANT_COUNTS = np.array([2, 1, 0, 1, 2])


@pytest.fixture
def popularity() -> Popularity:
    return Popularity.of(COUNTS, n_users=8)


def test_the_tail_is_the_last_fifth_of_interactions_and_what_nobody_touched(popularity: Popularity) -> None:
    assert popularity.is_tail.tolist() == [False, False, True, True, True]  # 6 + 2 of 10 are the head
    assert Popularity.of(np.array([5, 5]), 5).is_tail.tolist() == [False, False]


def test_every_metric_equals_the_plain_loop(popularity: Popularity) -> None:
    found = list_metrics(LISTS, HITS, RELEVANT_COUNTS, popularity, (1, 3))
    assert list(found) == list_metric_names((1, 3))
    for k in (1, 3):
        shown = [[item for item in row[:k] if item >= 0] for row in LISTS.tolist()]
        exposure = [sum(item in row for row in shown) for item in range(5)]
        pairs = [abs(a - b) for a in exposure for b in exposure]
        assert found[f"gini@{k}"] == pytest.approx(sum(pairs) / (2 * 5 * sum(exposure)))
        arp = np.mean([np.mean([COUNTS[item] for item in row]) for row in shown])
        assert found[f"arp@{k}"] == pytest.approx(arp)
        aplt = np.mean([np.mean([item in (2, 3, 4) for item in row]) for row in shown])
        assert found[f"aplt@{k}"] == pytest.approx(aplt)
        epc, efd = [], []
        for row, hits in zip(LISTS[:, :k].tolist(), HITS[:, :k].tolist(), strict=True):
            discounts = [1 / math.log2(rank + 1) for rank in range(1, k + 1)]
            rarity = [-math.log2(max(COUNTS[item], 1) / 10) for item in row]
            known = [1 - COUNTS[item] / 8 for item in row]
            total = sum(discounts)
            epc.append(sum(d * n for d, n, hit in zip(discounts, known, hits, strict=True) if hit) / total)
            efd.append(sum(d * n for d, n, hit in zip(discounts, rarity, hits, strict=True) if hit) / total)
        assert found[f"epc@{k}"] == pytest.approx(np.mean(epc))
        assert found[f"efd@{k}"] == pytest.approx(np.mean(efd))
    assert found["popreo@3"] == pytest.approx(
        popreo(np.array([1, 0, 0, 0, 2]), RELEVANT_COUNTS, popularity.is_tail)
    )


def test_gini_of_equal_and_of_single_exposure() -> None:
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 9])) == pytest.approx(2 / 3)
    assert gini(np.array([0, 0])) == 0


def test_popreo_is_zero_where_head_and_tail_are_found_equally() -> None:
    is_tail = np.array([False, True])
    assert popreo(np.array([2, 1]), np.array([4, 2]), is_tail) == pytest.approx(0)
    assert popreo(np.array([4, 0]), np.array([4, 2]), is_tail) == pytest.approx(1)
    assert math.isnan(popreo(np.array([0, 0]), np.array([4, 2]), is_tail))
    assert math.isnan(popreo(np.array([1, 0]), np.array([4, 0]), is_tail))


def test_intra_list_distance_equals_the_loop_over_pairs() -> None:
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, True, False, True, True])
    found = intra_list_distance(LISTS, vectors, present, 3, block_users=2)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for user, row in enumerate(LISTS.tolist()):
        items = [item for item in row if item >= 0 and present[item]]
        pairs = [1 - float(unit[a] @ unit[b]) for a in items for b in items if a < b]
        assert found[user] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert np.isnan(intra_list_distance(LISTS, vectors, present, 1)).all()


def test_category_distance_counts_pairs_without_a_common_category() -> None:
    categories = [frozenset("ab"), frozenset("b"), frozenset(), frozenset("c"), frozenset("a")]
    found = category_distance(LISTS, categories, 3)
    assert found.tolist() == [0.0, 0.0, 1.0]  # 0 and 4 share a; 1 and 0 share b; 3 and 4 share nothing
    assert np.isnan(category_distance(np.array([[2, 3]]), categories, 2)).all()


def test_recall_of_groups_of_items_counts_users_who_have_any() -> None:
    users, items = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 4, 3, 1, 4, 0])
    groups = {"head": np.array([1, 1, 0, 0, 0], bool), "tail": np.array([0, 0, 1, 1, 1], bool)}
    found = group_recall(LISTS, HITS, (users, items), groups, 3)
    assert found["head"] == (pytest.approx((1 / 1 + 0 / 1 + 0 / 1) / 3), 3, 2)
    assert found["tail"] == (pytest.approx((1 / 2 + 1 / 1) / 2), 2, 3)
    nobody = group_recall(LISTS, HITS, (users, items), {"none": np.zeros(5, bool)}, 3)
    assert math.isnan(nobody["none"][0])
