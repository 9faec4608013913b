"""GRCN by the book: Wei et al., MM 2020, neighbour by neighbour."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, softmax, unit


def embed(
    p: Parameters, matrix: Floats, features: dict[str, Floats], n_routings: int, n_layers: int
) -> tuple[Floats, Floats]:
    n_users = len(matrix)
    both = np.block(
        [[np.zeros((n_users, n_users)), matrix], [matrix.T, np.zeros((matrix.shape[1], matrix.shape[1]))]]
    )
    neighbours = [np.flatnonzero(row) for row in both]
    weight = np.full(both.shape, -np.inf)
    content = []
    for m, (name, table) in enumerate(features.items()):
        items = table @ p[f"projections.{name}.weight"] + p[f"projections.{name}.bias"]
        nodes = np.vstack([unit(p[f"preferences.{name}"]), unit(np.where(items > 0, items, 0.01 * items))])
        for _ in range(n_routings):
            moved = nodes.copy()
            for user in range(n_users):
                heard = nodes[neighbours[user]]
                moved[user] = unit(nodes[user] + softmax(heard @ nodes[user]) @ heard)
            nodes = moved
        affinity = np.zeros(both.shape)
        for node, others in enumerate(neighbours):
            if len(others):
                affinity[node, others] = softmax(nodes[others] @ nodes[node])
        content.append(nodes + affinity @ nodes)
        weight = np.maximum(weight, affinity * p["confidence"][:, m])
    refined = np.maximum(weight, 0)
    layer = total = unit(p["embeddings"])
    for _ in range(n_layers):
        layer = refined @ layer
        total = total + layer
    nodes = np.hstack([total, *content])
    return nodes[:n_users], nodes[n_users:]


def loss(
    p: Parameters, users: Floats, items: Floats, modalities: list[str], batch: PlainBatch, l2: float
) -> float:
    rows, positives, drawn = batch
    x, n_users = p["embeddings"], len(users)
    own = half_squares(x[rows], x[n_users + positives], x[n_users + drawn])
    own += half_squares(*(p[f"preferences.{name}"][rows] for name in modalities))
    return bpr(users, items, batch) + l2 / len(rows) * own
