"""DualGNN and DRAGON by the book: Wang et al., TMM 2021; Zhou et al., ECAI 2023; on dense matrices."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bipartite, bpr, half_squares, nearest, over_roots, unit


def user_graph(matrix: Floats, k: int) -> Floats:
    """(U, U) softmax over the k users with most items in common of that number; the lower user in a tie."""
    graph = np.zeros((len(matrix), len(matrix)))
    for user in range(len(matrix)):
        common = {v: matrix[user] @ matrix[v] for v in range(len(matrix)) if v != user}
        best = sorted((v for v in common if common[v]), key=lambda v: (-common[v], v))[:k]
        for v in best:
            graph[user, v] = np.exp(common[v]) / sum(np.exp(common[w]) for w in best)
    return graph


def by_modality(p: Parameters, matrix: Floats, features: dict[str, Floats], n_layers: int) -> list[Floats]:
    """(U + I, D) sum over layers of each modality's propagation."""
    adjacency = bipartite(matrix)
    parts = []
    for name, table in features.items():
        hidden = table @ p[f"parts.{name}.inner.weight"] + p[f"parts.{name}.inner.bias"]
        hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        content = hidden @ p[f"parts.{name}.outer.weight"] + p[f"parts.{name}.outer.bias"]
        layer = np.vstack([unit(p[f"parts.{name}.preference"]), unit(content)])
        total = layer
        for _ in range(n_layers):
            layer = adjacency @ layer
            total = total + layer
        parts.append(total)
    return parts


def dualgnn(
    p: Parameters, matrix: Floats, features: dict[str, Floats], n_layers: int, k: int
) -> tuple[Floats, Floats]:
    n_users = len(matrix)
    parts = by_modality(p, matrix, features, n_layers)
    users = sum(p["weights"][:, [m]] * part[:n_users] for m, part in enumerate(parts))
    return users + user_graph(matrix, k) @ users, sum(part[n_users:] for part in parts)


def dragon(
    p: Parameters,
    matrix: Floats,
    features: dict[str, Floats],
    item_graph: Floats,
    n_layers: int,
    n_item_layers: int,
    n_neighbours: int,
) -> tuple[Floats, Floats]:
    n_users = len(matrix)
    parts = by_modality(p, matrix, features, n_layers)
    users = np.hstack([p["weights"][:, [m]] * part[:n_users] for m, part in enumerate(parts)])
    items = np.hstack([part[n_users:] for part in parts])
    smooth = np.linalg.matrix_power(item_graph, n_item_layers) @ items
    return users + user_graph(matrix, n_neighbours) @ users, items + smooth


def blended(
    features: dict[str, Floats], present: dict[str, np.ndarray], shares: dict[str, float], k: int
) -> Floats:
    """The item graph of FREEDOM: edges of weight 1, each modality's share."""
    return sum(
        shares[name] * over_roots((nearest(table, present[name], k) != 0).astype(float))
        for name, table in features.items()
    )


def loss(
    p: Parameters, users: Floats, items: Floats, modalities: list[str], batch: PlainBatch, l2: float
) -> float:
    rows = batch[0]
    own = half_squares(*(p[f"parts.{name}.preference"][rows] for name in modalities), p["weights"][rows])
    return bpr(users, items, batch) + l2 / len(rows) * own
