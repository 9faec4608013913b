"""Ranking metrics and full ranking as plain loops over one user's list, written from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def plain_metrics(ranked: Sequence[int], relevant: set[int], k: int) -> dict[str, float]:
    """All user metrics of one list of item rows, best first."""
    hits = [item in relevant for item in ranked[:k]]
    n_best = min(k, len(relevant))
    dcg = 0.0
    precision_sum = 0.0
    reciprocal_rank = 0.0
    n_found = 0
    for rank, hit in enumerate(hits, start=1):
        if hit:
            n_found += 1
            dcg += 1 / math.log2(rank + 1)
            precision_sum += n_found / rank
            if n_found == 1:
                reciprocal_rank = 1 / rank
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, n_best + 1))
    return {
        f"recall@{k}": n_found / len(relevant),
        f"ndcg@{k}": dcg / ideal,
        f"precision@{k}": n_found / k,
        f"map@{k}": precision_sum / n_best,
        f"mrr@{k}": reciprocal_rank,
        f"hit_rate@{k}": float(n_found > 0),
    }


def plain_ranking(scores: np.ndarray, seen: set[int], k: int) -> list[int]:
    """The k best unseen items of one user; equal scores by the lower row; -inf is never recommended."""
    candidates = [item for item in range(len(scores)) if item not in seen and scores[item] > -math.inf]
    return sorted(candidates, key=lambda item: (-scores[item], item))[:k]


def plain_evaluation(
    scores: np.ndarray, held_out: dict[int, set[int]], seen: dict[int, set[int]], ks: Sequence[int]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Means with coverage, and each user's values; ``held_out`` has the users with something to find."""
    per_user: dict[int, dict[str, float]] = {}
    recommended: dict[int, set[int]] = {k: set() for k in ks}
    for user, relevant in held_out.items():
        ranked = plain_ranking(scores[user], seen.get(user, set()), max(ks))
        per_user[user] = {}
        for k in ks:
            per_user[user] |= plain_metrics(ranked, relevant, k)
            recommended[k] |= set(ranked[:k])
    names = next(iter(per_user.values()))
    means = {name: sum(values[name] for values in per_user.values()) / len(per_user) for name in names}
    return means | {
        f"coverage@{k}": len(items) / scores.shape[1] for k, items in recommended.items()
    }, per_user
