"""Ranking metrics of top-K lists, on arrays, for several k in one pass.

Relevance is binary. With ``h_r`` = 1 where the item at rank r (from 1) is relevant, and R relevant items:

| metric | value at k |
|---|---|
| recall | sum of h_r over r <= k, divided by R |
| precision | the same sum, divided by k (also where the list is shorter than k) |
| hit_rate | 1 if the sum is not 0 |
| mrr | 1 / rank of the first relevant item, 0 if it is beyond k |
| map | sum over r <= k of h_r x precision at r, divided by min(k, R) |
| ndcg | sum over r <= k of h_r / log2(r + 1), divided by that of a list that starts with min(k, R) hits |
| coverage | share of the catalogue that is in the first k of at least one user |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

USER_METRICS = ("recall", "ndcg", "precision", "map", "mrr", "hit_rate")
"""What is measured a user; ``coverage`` is of all users together."""


def metric_names(ks: Sequence[int]) -> list[str]:
    """Return ``recall@5``, ``recall@10``, ... in the order of the columns everywhere."""
    return [f"{metric}@{k}" for metric in USER_METRICS for k in ks]


def rank_metrics(
    hits: NDArray[np.bool_], n_relevant: NDArray[np.int64], ks: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Compute every user metric at every k.

    Args:
        hits: (U, K) whether the item at each rank is relevant, best rank first; ranks beyond K are misses.
        n_relevant: (U,) relevant items of each user, at least 1, those outside of the list included.
        ks: List lengths, each at least 1.

    Returns:
        ``metric@k`` to (U,) values in 0 .. 1, in the order of ``metric_names``.

    Raises:
        ValueError: Shapes that do not fit, a user without relevant items, or more hits than relevant items.
    """
    _check(hits, n_relevant, ks)
    depth = max(ks)
    hits = np.pad(hits[:, :depth], ((0, 0), (0, max(0, depth - hits.shape[1]))))
    ranks = np.arange(1, depth + 1)
    discounts = 1 / np.log2(ranks + 1)
    found = hits.cumsum(axis=1)  # (U, depth) hits up to each rank
    gains = (hits * discounts).cumsum(axis=1)
    ideal_gains = discounts.cumsum()  # (depth,) gain of a list that starts with r hits
    precisions = (hits * (found / ranks)).cumsum(axis=1)
    first_rank = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, depth + 1)

    values: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        best = np.minimum(k, n_relevant)  # hits of the ideal list
        values[f"recall@{k}"] = found[:, k - 1] / n_relevant
        values[f"ndcg@{k}"] = gains[:, k - 1] / ideal_gains[best - 1]
        values[f"precision@{k}"] = found[:, k - 1] / k
        values[f"map@{k}"] = precisions[:, k - 1] / best
        values[f"mrr@{k}"] = np.where(first_rank <= k, 1 / first_rank, 0.0)
        values[f"hit_rate@{k}"] = (first_rank <= k).astype(np.float64)
    return {name: values[name] for name in metric_names(ks)}


def coverage(best_ranks: NDArray[np.int64], ks: Sequence[int]) -> dict[str, float]:
    """Share of the catalogue that at least one user is recommended.

    Args:
        best_ranks: (I,) each item's best rank (from 1) in any user's list; beyond all k where it is in none.
        ks: List lengths.
    """
    return {f"coverage@{k}": float(np.mean(best_ranks <= k)) for k in ks}


def _check(hits: NDArray[np.bool_], n_relevant: NDArray[np.int64], ks: Sequence[int]) -> None:
    """Refuse what would silently give wrong figures."""
    if hits.ndim != 2 or n_relevant.shape != hits.shape[:1]:
        raise ValueError(f"hits is {hits.shape}, n_relevant {n_relevant.shape}; expected (U, K) and (U,).")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; expected list lengths of at least 1.")
    if len(n_relevant) and n_relevant.min() < 1:
        raise ValueError("A user has no relevant item, so recall is undefined; leave such users out.")
    if (hits.sum(axis=1) > n_relevant).any():
        raise ValueError("A user has more hits than relevant items; expected each relevant item once.")
