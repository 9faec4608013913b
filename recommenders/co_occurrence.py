"""Who has most in common with whom: neighbours of the rows of a sparse matrix, block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from recommenders.interactions import Float32Array, Int64Array, Interactions
from recommenders.item_graphs import Edges, ItemGraph

_BLOCK_ROWS = 1024
"""Rows whose products with all others, a sparse matrix, are held at once."""

Weigh = Callable[[NDArray[np.float32], Int64Array, Int64Array], NDArray[np.float64]]
"""Turns the numbers that rows and columns have in common, with both, into weights above 0."""


def co_occurrence_neighbours(
    matrix: sparse.csr_matrix, k: int, weigh: Weigh, block_rows: int = 0
) -> tuple[Int64Array, Float32Array]:
    """Find for each row the k other rows that weigh most among those it has something in common with.

    Args:
        matrix: (N, M), 1 where a row has a column.
        k: Neighbours per row; of equally heavy ones the lower rows make the list.
        weigh: See ``Weigh``.
        block_rows: Rows handled at once; 0 for the default.

    Returns:
        (N, k) neighbours, the heaviest first, and weights; where a row has fewer, 0 with weight 0.
    """
    n_rows = matrix.shape[0]
    k = min(k, max(n_rows - 1, 1))
    block_rows = block_rows or _BLOCK_ROWS
    transposed = matrix.T.tocsr()
    neighbours = np.zeros((n_rows, k), dtype=np.int64)
    weights = np.zeros((n_rows, k), dtype=np.float32)
    for start in range(0, n_rows, block_rows):
        together = sparse.coo_matrix(matrix[start : start + block_rows] @ transposed)
        rows, columns = start + together.row.astype(np.int64), together.col.astype(np.int64)
        others = rows != columns
        rows, columns = rows[others], columns[others]
        values = weigh(together.data[others], rows, columns)
        order = np.lexsort((columns, -values, rows))  # by row, the heaviest first
        rows, columns, values = rows[order], columns[order], values[order]
        places = np.arange(len(rows)) - np.searchsorted(rows, rows)
        kept = places < k
        neighbours[rows[kept], places[kept]] = columns[kept]
        weights[rows[kept], places[kept]] = values[kept]
    return neighbours, weights


def user_graph(train: Interactions, k: int) -> ItemGraph:
    """Return the graph, between users, of each one's k users with most items in common.

    Weights are the softmax over a user's list of the numbers of common items. A user alone has no edges.

    Source: Wang et al., "DualGNN", IEEE TMM 2021, sec. III-C.
    """
    neighbours, common = co_occurrence_neighbours(
        train.csr(), k, lambda counts, _rows, _columns: counts.astype(np.float64)
    )
    listed = common > 0
    exps = np.where(listed, np.exp(common - common.max(axis=1, keepdims=True), dtype=np.float64), 0.0)
    shares = exps / np.maximum(exps.sum(axis=1, keepdims=True), 1.0)
    users = np.broadcast_to(np.arange(train.n_users)[:, None], neighbours.shape)
    edges = Edges.between(
        torch.from_numpy(users[listed]), torch.from_numpy(neighbours[listed]), train.n_users
    )
    return ItemGraph(edges, torch.from_numpy(shares[listed]).float())
