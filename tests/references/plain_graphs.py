"""Graphs as dense matrices, and the losses on them, written from the definitions, in float64."""

from __future__ import annotations

import numpy as np

from tests.references.plain_bpr import Floats, PlainBatch


def user_item_matrix(train) -> Floats:
    """(U, I), 1 where a user took an item."""
    matrix = np.zeros((train.n_users, train.n_items))
    matrix[train.user_rows, train.item_rows] = 1
    return matrix


def symmetric(matrix: Floats) -> Floats:
    """R with each entry over the root of both degrees."""
    users, items = matrix.sum(axis=1), matrix.sum(axis=0)
    return np.divide(matrix, np.sqrt(np.outer(users, items)), out=np.zeros_like(matrix), where=matrix > 0)


def bipartite(matrix: Floats) -> Floats:
    """(U + I, U + I), the symmetrically normalised adjacency, users first."""
    users, items = matrix.shape
    normal = symmetric(matrix)
    return np.block([[np.zeros((users, users)), normal], [normal.T, np.zeros((items, items))]])


def mean_of_layers(adjacency: Floats, x: Floats, n_layers: int) -> Floats:
    layers = [x]
    for _ in range(n_layers):
        layers.append(adjacency @ layers[-1])
    return np.mean(layers, axis=0)


def unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(features: Floats, present: np.ndarray, k: int) -> Floats:
    """(I, I) cosines, kept where the column is among the k nearest of the row (itself counted), else 0.

    An item without the modality has an empty row and column.
    """
    similar = unit(features) @ unit(features).T
    kept = np.zeros_like(similar)
    rows = np.flatnonzero(present)
    for i in rows:
        best = rows[np.argsort(-similar[i, rows])][:k]
        kept[i, best] = similar[i, best]
    return kept


def over_roots(weights: Floats) -> Floats:
    """D^-1/2 W D^-1/2 with D the sums of rows."""
    degrees = weights.sum(axis=1)
    roots = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1e-300)), 0)
    return roots[:, None] * weights * roots


def bpr(users: Floats, items: Floats, batch: PlainBatch) -> float:
    """Mean of -ln sigmoid of the differences of inner products."""
    u, i, drawn = batch
    positive = (users[u] * items[i]).sum(axis=1)[:, None]
    negative = np.einsum("bd,bnd->bn", users[u], items[drawn])
    return float(np.mean(np.log1p(np.exp(negative - positive))))


def half_squares(*arrays: Floats) -> float:
    return 0.5 * sum(float((array**2).sum()) for array in arrays)


def info_nce(one: Floats, other: Floats, temperature: float) -> float:
    """Mean over rows of -ln of the share of its own counterpart among all, by exp(cosine / temperature)."""
    similar = np.exp(unit(one) @ unit(other).T / temperature)
    return float(np.mean(-np.log(np.diag(similar) / similar.sum(axis=1))))


def logistic(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def softmax(x: Floats, axis: int = -1) -> Floats:
    exps = np.exp(x - x.max(axis=axis, keepdims=True))
    return exps / exps.sum(axis=axis, keepdims=True)
