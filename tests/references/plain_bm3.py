"""BM3 by the book: Zhou et al., WWW 2023, eq. 2 to 15, without dropout."""

from __future__ import annotations

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import half_squares, mean_of_layers, unit


def hidden(p: Parameters, adjacency: Floats, n_users: int, n_layers: int) -> tuple[Floats, Floats]:
    x = p["embeddings"]
    mean = mean_of_layers(adjacency, x, n_layers)
    return mean[:n_users], mean[n_users:] + x[n_users:]


def predict(p: Parameters, h: Floats) -> Floats:
    return h @ p["predictor.weight"] + p["predictor.bias"]


def apart(a: Floats, b: Floats) -> float:
    """C of eq. 8 for one pair."""
    return -float(unit(a) @ unit(b))


def loss(
    p: Parameters,
    stopped: Parameters,
    batch: PlainBatch,
    features: dict[str, Floats],
    adjacency: Floats,
    n_users: int,
    n_layers: int,
    weight: float,
    l2: float,
) -> float:
    users, items = hidden(p, adjacency, n_users, n_layers)
    fixed_users, fixed_items = hidden(stopped, adjacency, n_users, n_layers)
    total = 0.0
    for u, i in zip(*batch[:2], strict=True):
        total += apart(predict(p, users[u]), fixed_items[i]) + apart(predict(p, items[i]), fixed_users[u])
        for name, table in features.items():
            w, b = f"projections.{name}.weight", f"projections.{name}.bias"
            online = predict(p, table[i] @ p[w] + p[b])
            total += weight * apart(online, fixed_items[i])
            total += weight * apart(online, table[i] @ stopped[w] + stopped[b])
        total += l2 * half_squares(users[u], items[i])
    return total / len(batch[0])
