"""Graphs as sparse matrices and neighbour lists: users and items, items and their nearest items."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from recommenders.interactions import Interactions

_BLOCK_NUMBERS = 1 << 25
"""Similarities held at once while neighbours are searched: 2^25 float32 are 128 MiB."""


def user_item_adjacency(train: Interactions) -> Tensor:
    """Return the symmetrically normalised adjacency of the bipartite user-item graph.

    Entry (u, i) is 1 / sqrt(degree(u) degree(i)) where u and i interacted; users come first. A user or item
    without an interaction has an empty row.

    Returns:
        (U + I, U + I) sparse CSR float32 with int32 indices, for which MKL has the fastest product: on 26k
        nodes, 237k entries, 64 columns and two cores 2.5 ms, against 3.1 with int64 and 7.1 as COO.

    Source: He et al., "LightGCN", SIGIR 2020, eq. 7 and 8.
    """
    users, items = np.divmod(train.keys(), max(train.n_items, 1))
    items += train.n_users
    n_nodes = train.n_users + train.n_items
    sources, targets = np.concatenate([users, items]), np.concatenate([items, users])
    degrees = np.bincount(sources, minlength=n_nodes)
    weights = 1.0 / np.sqrt(degrees[sources] * degrees[targets])
    adjacency = sparse.csr_matrix((weights, (sources, targets)), shape=(n_nodes, n_nodes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(adjacency.indptr.astype(np.int32)),
            torch.from_numpy(adjacency.indices.astype(np.int32)),
            torch.from_numpy(adjacency.data.astype(np.float32)),
            size=(n_nodes, n_nodes),
            check_invariants=True,
        )


def mean_propagation(adjacency: Tensor, embeddings: Tensor, n_layers: int) -> Tensor:
    """Return the mean of ``A^0 x, A^1 x, ... A^L x`` for a symmetric sparse ``A``.

    Args:
        adjacency: (N, N) sparse CSR, equal to its transpose; it gets no gradient.
        embeddings: (N, D) the layer 0, x.
        n_layers: L, 0 or more.

    Returns:
        (N, D).

    Source: He et al., "LightGCN", SIGIR 2020, eq. 4 and 8 with alpha_k = 1 / (L + 1).
    """
    result: Tensor = _SymmetricPropagation.apply(adjacency, embeddings, n_layers)
    return result


class _SymmetricPropagation(torch.autograd.Function):
    """The mean over layers as one linear map P(A), evaluated by Horner's rule.

    x + A (x + A (x + ...)) needs no layer but the last, and one fused multiply-add a layer. A polynomial of a
    symmetric matrix is symmetric, so the gradient of P(A) x with respect to x is P(A) applied to the incoming
    gradient: the same function again, nothing saved but A, and no transposed copy of A.
    """

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, embeddings: Tensor, n_layers: int) -> Tensor:
        ctx.adjacency, ctx.n_layers = adjacency, n_layers
        total = embeddings
        for _ in range(n_layers):
            total = torch.addmm(embeddings, adjacency, total)
        return total / (n_layers + 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, mean_propagation(ctx.adjacency, gradients[0], ctx.n_layers), None


@torch.no_grad()
def cosine_neighbours(vectors: Tensor, k: int, block_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Find each row's k nearest other rows by cosine, exactly, in I x k memory and one block of scores.

    A row of zeros has cosine 0 with every row. Which of several equally similar rows make the list is not
    defined, but the same in each run.

    Args:
        vectors: (I, F) floats.
        k: Neighbours per row, the row itself not counted; where there are fewer other rows, all of them.
        block_rows: Rows whose I similarities are held at once; 0 chooses them for 128 MiB.

    Returns:
        neighbours: (I, k) int64 rows, the nearest first.
        similarities: (I, k) float32 cosines.
    """
    n_items = len(vectors)
    k = min(k, max(n_items - 1, 0))
    block_rows = block_rows or max(1, _BLOCK_NUMBERS // max(n_items, 1))
    unit = normalize(vectors.float(), dim=1)
    neighbours = torch.empty((n_items, k), dtype=torch.int64, device=vectors.device)
    similarities = torch.empty((n_items, k), device=vectors.device)
    for start in range(0, n_items, block_rows):
        block = unit[start : start + block_rows] @ unit.T  # (block, I)
        own = torch.arange(len(block), device=vectors.device)
        block[own, start + own] = -torch.inf
        stop = start + len(block)
        torch.topk(block, k, dim=1, out=(similarities[start:stop], neighbours[start:stop]))
    return neighbours, similarities
