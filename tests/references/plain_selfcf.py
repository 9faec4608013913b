"""SelfCF by the book: Zhou et al., TORS 2023, without perturbation or with a pruned graph."""

from __future__ import annotations

from tests.references.numeric import Parameters
from tests.references.plain_bm3 import apart, predict
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import half_squares, mean_of_layers


def score(p: Parameters, adjacency: Floats, n_users: int, n_layers: int) -> Floats:
    e = mean_of_layers(adjacency, p["embeddings"], n_layers)
    users, items = e[:n_users], e[n_users:]
    return predict(p, users) @ items.T + users @ predict(p, items).T


def loss(
    p: Parameters,
    stopped: Parameters,
    batch: PlainBatch,
    adjacency: Floats,
    pruned: Floats,
    n_users: int,
    n_layers: int,
    l2: float,
) -> float:
    e = mean_of_layers(adjacency, p["embeddings"], n_layers)
    view = mean_of_layers(pruned, stopped["embeddings"], n_layers)
    total = 0.0
    for u, i in zip(batch[0], n_users + batch[1], strict=True):
        total += (apart(predict(p, e[u]), view[i]) + apart(predict(p, e[i]), view[u])) / 2
        total += l2 * half_squares(e[u], e[i])
    return total / len(batch[0])
