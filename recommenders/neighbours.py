"""Each item's nearest items by cosine: exact up to a size, by an inverted file beyond it; never I x I."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

EXACT_UP_TO = 250_000
"""Rows up to which neighbours are exact. All pairs of 250,000 rows of 512 numbers are 6 * 10^13 operations,
minutes on a few cores; a million rows take hours."""
_BLOCK_NUMBERS = 1 << 25
"""Similarities held at once while neighbours are searched: 2^25 float32 are 128 MiB."""
_TRAINED_ROWS_PER_LIST = 64
_ROUNDS = 8
"""Of k-means; lists need not be the best."""
_SHARE_SEARCHED, _LEAST_SEARCHED = 128, 16
"""One in how many lists is searched for the rows of a list, and the fewest."""


@torch.no_grad()
def cosine_neighbours(
    vectors: Tensor, k: int, block_rows: int = 0, exact_up_to: int = EXACT_UP_TO
) -> tuple[Tensor, Tensor]:
    """Find each row's k nearest other rows by cosine, in I x k memory and one block of scores.

    A row of zeros has cosine 0 with every row. Which of several equally similar rows make the list is not
    defined, but the same in each run. Above ``exact_up_to`` rows only the members of near lists of an
    inverted file are compared, so that some neighbours are missed and others stand in for them.

    Args:
        vectors: (I, F) floats.
        k: Neighbours per row, the row itself not counted; where there are fewer other rows, all of them.
        block_rows: Rows whose I similarities are held at once; 0 chooses them for 128 MiB.
        exact_up_to: Rows up to which all pairs are compared.

    Returns:
        neighbours: (I, k) int64 rows, the nearest first.
        similarities: (I, k) float32 cosines.
    """
    k = min(k, max(len(vectors) - 1, 0))
    if len(vectors) > exact_up_to and k:
        return _by_lists(vectors, k)
    n_items = len(vectors)
    block_rows = block_rows or _rows_at_once(n_items)
    unit = normalize(vectors.float(), dim=1)
    neighbours = torch.empty((n_items, k), dtype=torch.int64, device=vectors.device)
    similarities = torch.empty((n_items, k), device=vectors.device)
    for start in range(0, n_items, block_rows):
        block = unit[start : start + block_rows] @ unit.T  # (block, I)
        own = torch.arange(len(block), device=vectors.device)
        block[own, start + own] = -torch.inf
        stop = start + len(block)
        torch.topk(block, k, dim=1, out=(similarities[start:stop], neighbours[start:stop]))
        del block  # or the next one is made beside it
    return neighbours, similarities


def search_bytes(n_items: int, width: int, block_rows: int = 0, exact_up_to: int = EXACT_UP_TO) -> int:
    """Estimate the memory of ``cosine_neighbours`` on (I, F) vectors: copies, and a block of scores."""
    copies = 3 * 4 * n_items * width
    if n_items > exact_up_to:
        return copies
    return copies + 4 * n_items * min(block_rows or _rows_at_once(n_items), n_items)


def _rows_at_once(n_items: int) -> int:
    """Return the rows whose similarities with all others are 128 MiB."""
    return max(1, _BLOCK_NUMBERS // max(n_items, 1))


def _by_lists(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours among the members of near lists, which k-means makes of a seeded sample of the rows.

    An inverted file, read list by list: the members of one list share their candidates, so that each block is
    one matrix product, where queries answered one by one would read all candidates anew.

    Source: Jegou, Douze and Schmid, "Product quantization for nearest neighbor search", TPAMI 2011, sec. 4.
    """
    unit = normalize(vectors.float(), dim=1)
    n_items = len(unit)
    n_lists = max(1, min(int(4 * math.sqrt(n_items)), n_items // _TRAINED_ROWS_PER_LIST))
    centroids = _centroids(unit, n_lists)
    step = max(1, _BLOCK_NUMBERS // n_lists)
    starts_of = range(0, n_items, step)
    list_of = torch.cat([(unit[start : start + step] @ centroids.T).argmax(dim=1) for start in starts_of])
    members = torch.argsort(list_of, stable=True)
    sizes = torch.bincount(list_of, minlength=n_lists)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).tolist()
    neighbours = torch.empty((n_items, k), dtype=torch.int64, device=vectors.device)
    similarities = torch.empty((n_items, k), device=vectors.device)
    n_near = min(n_lists, max(_LEAST_SEARCHED, n_lists // _SHARE_SEARCHED))
    for number in range(n_lists):
        own = members[starts[number] : starts[number + 1]]
        if not len(own):
            continue
        nearest = torch.argsort(centroids @ centroids[number], descending=True)
        # As many lists as it takes for every row to have k others.
        enough = int((sizes[nearest].cumsum(0) <= k).sum()) + 1
        near = nearest[: max(n_near, enough)].tolist()
        candidates = torch.cat([members[starts[each] : starts[each + 1]] for each in near])
        table = unit[candidates]
        for rows in own.split(max(1, _BLOCK_NUMBERS // len(candidates))):  # type: ignore[no-untyped-call]
            scores = unit[rows] @ table.T
            scores[candidates == rows[:, None]] = -torch.inf
            best, places = torch.topk(scores, k, dim=1)
            neighbours[rows], similarities[rows] = candidates[places], best
    return neighbours, similarities


def _centroids(unit: Tensor, n_lists: int) -> Tensor:
    """(L, F) centres of spherical k-means by FAISS."""
    import faiss  # noqa: PLC0415 - only large catalogues need it

    sample = np.random.default_rng(0).permutation(len(unit))[: n_lists * _TRAINED_ROWS_PER_LIST]
    rows = unit[torch.from_numpy(np.sort(sample)).to(unit.device)].cpu().numpy()
    kmeans = faiss.Kmeans(
        unit.shape[1],
        n_lists,
        niter=_ROUNDS,
        spherical=True,
        seed=0,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAINED_ROWS_PER_LIST,
    )
    kmeans.train(rows)
    return torch.from_numpy(kmeans.centroids).to(unit.device)
