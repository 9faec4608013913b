"""Each item's nearest items by cosine: exact up to a size, by an index beyond it; never I x I."""

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
_SHARE_SEARCHED = 128
"""One in how many lists is searched for a query, at least 16 of them."""
_QUERIES = 16_384
"""Rows searched for at once."""


@torch.no_grad()
def cosine_neighbours(
    vectors: Tensor, k: int, block_rows: int = 0, exact_up_to: int = EXACT_UP_TO
) -> tuple[Tensor, Tensor]:
    """Find each row's k nearest other rows by cosine, in I x k memory and one block of scores.

    A row of zeros has cosine 0 with every row. Which of several equally similar rows make the list is not
    defined, but the same in each run. Above ``exact_up_to`` rows an inverted-file index of FAISS searches the
    lists nearest to each row, so that some neighbours are missed and others stand in for them.

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
        return _by_index(vectors, k)
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


def _by_index(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours by FAISS's IVF on the CPU, its lists made by k-means on a seeded sample of the rows."""
    import faiss  # noqa: PLC0415 - only large catalogues need it

    unit = normalize(vectors.float().cpu(), dim=1).numpy()
    n_items, width = unit.shape
    n_lists = max(1, min(int(4 * math.sqrt(n_items)), n_items // _TRAINED_ROWS_PER_LIST))
    centroids = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(centroids, width, n_lists, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(n_items)[: n_lists * _TRAINED_ROWS_PER_LIST]
    index.train(unit[np.sort(sample)])
    index.add(unit)
    index.nprobe = min(n_lists, max(16, n_lists // _SHARE_SEARCHED))
    neighbours = np.empty((n_items, k), np.int64)
    similarities = np.empty((n_items, k), np.float32)
    for start in range(0, n_items, _QUERIES):
        stop = min(start + _QUERIES, n_items)
        scores, rows = index.search(unit[start:stop], k + 1)
        # The row itself goes to the end, wherever equal vectors put it; and so do places without a row.
        drop = (rows == np.arange(start, stop)[:, None]) | (rows < 0)
        order = np.argsort(drop, axis=1, kind="stable")[:, :k]
        neighbours[start:stop] = np.take_along_axis(rows, order, axis=1)
        similarities[start:stop] = np.take_along_axis(scores, order, axis=1)
        _fill(neighbours[start:stop], similarities[start:stop], start, unit)
    device = vectors.device
    return torch.from_numpy(neighbours).to(device), torch.from_numpy(similarities).to(device)


def _fill(
    neighbours: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    similarities: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    start: int,
    unit: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> None:
    """Give rows whose lists held too few others the next rows of the catalogue, with their true cosine."""
    n_items, k = len(unit), neighbours.shape[1]
    own = np.arange(start, start + len(neighbours))
    wrong = (neighbours < 0) | (neighbours == own[:, None])
    for row in np.flatnonzero(wrong.any(axis=1)):
        found = neighbours[row][~wrong[row]]
        others = (own[row] + 1 + np.arange(min(2 * k + 1, n_items - 1))) % n_items
        more = others[~np.isin(others, found)][: k - len(found)]
        rows = np.concatenate([found, more])
        scores = unit[rows] @ unit[own[row]]
        order = np.argsort(-scores, kind="stable")
        neighbours[row], similarities[row] = rows[order], scores[order]
