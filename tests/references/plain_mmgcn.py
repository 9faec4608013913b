"""MMGCN by the book: Wei et al., MM 2019, on a dense graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, unit


def leaky(x: Floats) -> Floats:
    return np.where(x > 0, x, 0.01 * x)


def mean_over_neighbours(matrix: Floats) -> Floats:
    """(U + I, U + I): each row averages over the nodes it has a pair with."""
    n_users, n_items = matrix.shape
    whole = np.block([[np.zeros((n_users, n_users)), matrix], [matrix.T, np.zeros((n_items, n_items))]])
    return whole / np.maximum(whole.sum(axis=1, keepdims=True), 1)


def embeddings(
    p: Parameters, mean: Floats, features: Mapping[str, Floats], n_layers: int, combination: str
) -> Floats:
    """(U + I, D), layer by layer, summed over modalities."""
    total = 0.0
    for name, vectors in features.items():
        own = {key.removeprefix(f"networks.{name}."): value for key, value in p.items()}
        x = np.concatenate([own["preferences"], vectors @ own["projection.weight"] + own["projection.bias"]])
        x = unit(x)
        for layer in range(n_layers):
            h = leaky(mean @ x @ own[f"w1.{layer}"])
            node = leaky(x @ own[f"w2.{layer}"] + own[f"b2.{layer}"]) + p["ids"]
            if combination == "concatenation":
                x = np.concatenate([h, node], axis=1) @ own[f"w3.{layer}"] + own[f"b3.{layer}"]
            else:
                x = h @ own[f"w3.{layer}"] + own[f"b3.{layer}"] + node
            x = leaky(x)
        total = total + x
    return total


def loss(p: Parameters, final: Floats, batch: PlainBatch, n_users: int, l2: float) -> float:
    """BPR, and L2 on the ids and preferences of the batch."""
    users, items, drawn = batch
    own = [p["ids"][users], p["ids"][n_users + items], p["ids"][n_users + drawn]]
    own += [value[users] for key, value in p.items() if key.endswith("preferences")]
    return bpr(final[:n_users], final[n_users:], batch) + l2 / len(users) * half_squares(*own)
