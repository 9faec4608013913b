"""What lists are like apart from being right: exposure, popularity, novelty, diversity, fairness of items.

All take (U, K) item rows, best first, -1 where a list is shorter, and look at the first k of them. The long
tail are the least popular items that together have a fifth of the training interactions, the head the others.

| metric | value |
|---|---|
| gini | 0 where all items are shown equally often, towards 1 where few are |
| arp | mean training interactions of the items shown (Yin et al., VLDB 2012) |
| aplt | share of long-tail items in a list, mean over users (Abdollahpouri et al., FLAIRS 2019) |
| popreo | spread of the hit rates of head and tail over their mean (Zhu et al., SIGIR 2020); 0 is equal |
| epc | relevant items by 1 - share of users who know them, by rank (Vargas and Castells, RecSys 2011) |
| efd | relevant items by the bits of their rarity, by rank (the same) |
| ild | mean cosine distance between two items of a list (Ziegler et al., WWW 2005) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIST_METRICS = ("gini", "arp", "aplt", "popreo", "epc", "efd")
"""Of all users' lists together."""
_TAIL_SHARE = 0.2

Rows = NDArray[np.integer]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Popularity:
    """How often each item was interacted with in training, and what follows from it."""

    counts: Floats
    """(I,) training interactions."""
    n_users: int
    """Users of the training part."""
    is_tail: NDArray[np.bool_]
    """(I,) the least popular items that together have a fifth of the interactions, unseen ones among them."""

    @classmethod
    def of(cls, counts: Rows, n_users: int) -> Popularity:
        """Work out head and tail; among equally popular items the lower row is the more popular one."""
        popular_first = np.argsort(-counts, kind="stable")
        head_ends = np.cumsum(counts[popular_first]) >= (1 - _TAIL_SHARE) * counts.sum()
        is_tail = np.ones(len(counts), dtype=np.bool_)
        is_tail[popular_first[: int(np.argmax(head_ends)) + 1]] = False
        return cls(counts.astype(np.float64), n_users, is_tail)


def list_metric_names(ks: Sequence[int]) -> list[str]:
    """Return ``gini@5`` and so on, in the order of `list_metrics`."""
    return [f"{metric}@{k}" for metric in LIST_METRICS for k in ks]


def list_metrics(
    lists: Rows, hits: NDArray[np.bool_], relevant_counts: Rows, popularity: Popularity, ks: Sequence[int]
) -> dict[str, float]:
    """Measure everything of `LIST_METRICS`.

    Args:
        lists: (U, K) item rows, -1 where there is none.
        hits: (U, K) whether the item at each rank is relevant.
        relevant_counts: (I,) how many users each item is relevant to.
        popularity: Of the training part.
        ks: List lengths, each at most K.
    """
    values: dict[str, float] = {}
    for k in ks:
        shown = lists[:, :k]
        there = shown >= 0
        exposure = np.bincount(shown[there], minlength=len(popularity.counts))
        hit_counts = np.bincount(shown[hits[:, :k] & there], minlength=len(popularity.counts))
        values[f"gini@{k}"] = gini(exposure)
        values[f"arp@{k}"] = _mean_of_lists(popularity.counts, shown)
        values[f"aplt@{k}"] = _mean_of_lists(popularity.is_tail.astype(np.float64), shown)
        values[f"popreo@{k}"] = popreo(hit_counts, relevant_counts, popularity.is_tail)
        known = popularity.counts / max(popularity.n_users, 1)
        values[f"epc@{k}"] = _expected(1 - known, shown, hits[:, :k])
        share = popularity.counts / max(popularity.counts.sum(), 1)
        rarest = share[share > 0].min() if (share > 0).any() else 1.0
        values[f"efd@{k}"] = _expected(-np.log2(np.maximum(share, rarest)), shown, hits[:, :k])
    return {name: values[name] for name in list_metric_names(ks)}


def gini(exposure: Rows) -> float:
    """Gini coefficient of (I,) counts; 0 for equal counts, and where nothing is shown."""
    ascending = np.sort(exposure.astype(np.float64))
    total, n_items = ascending.sum(), len(ascending)
    if total == 0:
        return 0.0
    ranks = np.arange(1, n_items + 1)
    return float(((2 * ranks - n_items - 1) * ascending).sum() / (n_items * total))


def popreo(hit_counts: Rows, relevant_counts: Rows, is_tail: NDArray[np.bool_]) -> float:
    """Spread of the shares of relevant head and tail items that are found, over their mean.

    NaN where head or tail has nothing relevant, and where nothing is found.
    """
    shares = []
    for group in (is_tail, ~is_tail):
        relevant = relevant_counts[group].sum()
        if relevant == 0:
            return float("nan")
        shares.append(hit_counts[group].sum() / relevant)
    mean = float(np.mean(shares))
    return float(np.std(shares) / mean) if mean else float("nan")


def _mean_of_lists(value: Floats, shown: Rows) -> float:
    """Mean over users of the mean value of what they are shown; users who are shown nothing do not count."""
    there = shown >= 0
    sums = np.where(there, value[shown.clip(min=0)], 0).sum(axis=1)
    lengths = there.sum(axis=1)
    return float((sums[lengths > 0] / lengths[lengths > 0]).mean()) if (lengths > 0).any() else float("nan")


def _expected(novelty: Floats, shown: Rows, hits: NDArray[np.bool_]) -> float:
    """Rank-discounted novelty of relevant items; the discounts of a list sum to 1."""
    discounts = 1 / np.log2(np.arange(2, shown.shape[1] + 2))
    gains = np.where(hits, novelty[shown.clip(min=0)], 0) * discounts
    return float((gains.sum(axis=1) / discounts.sum()).mean())


def intra_list_distance(
    lists: Rows, vectors: Tensor, present: Tensor, k: int, *, block_users: int = 1024
) -> Floats:
    """Mean of 1 - cosine over the pairs of a list, by user; NaN where fewer than two items have a vector.

    With unit vectors the sum over pairs follows from the length of their sum, so that no pair is looked at.

    Args:
        lists: (U, K) item rows, -1 where there is none.
        vectors: (I, F) item features.
        present: (I,) bool: which items have them.
        k: How many of each list count.
        block_users: Users at a time.

    Returns:
        (U,) from 0 (all alike) to 2.
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=1).cpu()
    unit[~present.cpu()] = 0
    has_vector = present.cpu() & (unit.norm(dim=1) > 0)
    distances = np.full(len(lists), np.nan)
    for start in range(0, len(lists), block_users):
        shown = torch.from_numpy(lists[start : start + block_users, :k].astype(np.int64))
        counted = (shown >= 0) & has_vector[shown.clamp(min=0)]  # (B, k)
        rows = unit[shown.clamp(min=0)] * counted[:, :, None]  # (B, k, F)
        n = counted.sum(dim=1).double()
        similar = rows.sum(dim=1).square().sum(dim=1) - n  # over ordered pairs of different places
        block = (1 - similar / (n * (n - 1))).numpy()
        distances[start : start + len(shown)] = np.where(n.numpy() > 1, block, np.nan)
    return distances


def category_distance(lists: Rows, categories: Sequence[frozenset[str]], k: int) -> Floats:
    """Share of the pairs of a list that have no category in common, by user; NaN for fewer than two.

    Args:
        lists: (U, K) item rows, -1 where there is none.
        categories: Of each item; items without any do not count.
        k: How many of each list count.
    """
    names = sorted(frozenset().union(*categories)) if categories else []
    column = {name: number for number, name in enumerate(names)}
    member = np.zeros((len(categories), len(names)), dtype=np.bool_)
    for row, own in enumerate(categories):
        member[row, [column[name] for name in own]] = True
    distances = np.full(len(lists), np.nan)
    for user, shown in enumerate(lists[:, :k]):
        mine = member[shown[shown >= 0]]
        mine = mine[mine.any(axis=1)].astype(np.int64)
        n = len(mine)
        if n > 1:
            strangers = (mine @ mine.T) == 0
            distances[user] = strangers.sum() / (n * (n - 1))
    return distances


def group_recall(
    lists: Rows,
    hits: NDArray[np.bool_],
    relevant: tuple[Rows, Rows],
    groups: Mapping[str, NDArray[np.bool_]],
    k: int,
) -> dict[str, tuple[float, int, int]]:
    """Recall of the relevant items of each group of items, over the users who have any.

    Args:
        lists: (U, K) item rows.
        hits: (U, K).
        relevant: User place (0 .. U - 1) and item row of each relevant pair.
        groups: Name -> (I,) bool.
        k: List length.

    Returns:
        Name -> recall, users counted, items of the group.
    """
    users, items = relevant
    results = {}
    for name, members in groups.items():
        wanted = np.bincount(users[members[items]], minlength=len(lists))
        shown = lists[:, :k]
        found = (hits[:, :k] & members[shown.clip(min=0)] & (shown >= 0)).sum(axis=1)
        have = wanted > 0
        recall = float((found[have] / wanted[have]).mean()) if have.any() else float("nan")
        results[name] = (recall, int(have.sum()), int(members.sum()))
    return results
