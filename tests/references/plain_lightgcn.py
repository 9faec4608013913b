"""LightGCN by the book: He et al., SIGIR 2020, neighbour by neighbour, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.references.plain_bpr import Floats, PlainBatch, sigmoid


def propagate(pairs: Sequence[tuple[int, int]], n_users: int, embeddings: Floats, n_layers: int) -> Floats:
    """Return the mean over layers 0 .. L of (U + I, D) embeddings, eq. 3 and 4; users come first."""
    n_nodes = len(embeddings)
    neighbours: list[list[int]] = [[] for _ in range(n_nodes)]
    for user, item in pairs:
        neighbours[user].append(n_users + item)
        neighbours[n_users + item].append(user)
    layers = [embeddings]
    for _ in range(n_layers):
        layer = np.zeros_like(embeddings)
        for node in range(n_nodes):
            for other in neighbours[node]:
                norm = np.sqrt(len(neighbours[node])) * np.sqrt(len(neighbours[other]))
                layer[node] += layers[-1][other] / norm
        layers.append(layer)
    return np.mean(layers, axis=0)


def train_lightgcn(
    embeddings: Floats,
    pairs: Sequence[tuple[int, int]],
    n_users: int,
    batches: Sequence[PlainBatch],
    *,
    learning_rate: float,
    l2: float,
    n_layers: int,
) -> list[float]:
    """Take one SGD step per batch on the array in place; return the loss of each batch before its step.

    The propagated embeddings are M x for a matrix M, found here by propagating the unit vectors; the gradient
    of x is then M transposed times the gradient of the propagated embeddings.
    """
    matrix = propagate(pairs, n_users, np.eye(len(embeddings)), n_layers)
    losses = []
    for batch_users, positives, negatives in batches:
        n_rows, n_negatives = negatives.shape
        final = matrix @ embeddings
        loss = 0.0
        d_final, d_own = np.zeros_like(embeddings), np.zeros_like(embeddings)
        for u, positive, drawn in zip(batch_users, positives, negatives, strict=True):
            i = n_users + positive
            for negative in drawn:
                j = n_users + negative
                x_uij = final[u] @ final[i] - final[u] @ final[j]
                loss -= np.log(sigmoid(x_uij)) / (n_rows * n_negatives)
                slope = -sigmoid(-x_uij) / (n_rows * n_negatives)
                d_final[u] += slope * (final[i] - final[j])
                d_final[i] += slope * final[u]
                d_final[j] -= slope * final[u]
            for node in (u, i, *(n_users + drawn)):
                d_own[node] += l2 / n_rows * embeddings[node]
                loss += 0.5 * l2 / n_rows * float(embeddings[node] @ embeddings[node])
        embeddings -= learning_rate * (matrix.T @ d_final + d_own)
        losses.append(float(loss))
    return losses
