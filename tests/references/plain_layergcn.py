"""LayerGCN by the book: Zhou et al., ICDE 2023, on a dense adjacency."""

from __future__ import annotations

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, unit


def refined(adjacency: Floats, x: Floats, n_layers: int) -> Floats:
    total, layer = 0 * x, x
    for _ in range(n_layers):
        layer = adjacency @ layer
        likeness = (unit(layer) * unit(x)).sum(axis=1, keepdims=True)
        layer = (likeness + 1e-8) * layer
        total = total + layer
    return total


def loss(
    p: Parameters, batch: PlainBatch, adjacency: Floats, n_users: int, n_layers: int, l2: float
) -> float:
    users, items, drawn = batch
    x = p["embeddings"]
    final = refined(adjacency, x, n_layers)
    own = half_squares(x[users], x[n_users + items], x[n_users + drawn])
    return bpr(final[:n_users], final[n_users:], batch) + l2 / len(users) * own
