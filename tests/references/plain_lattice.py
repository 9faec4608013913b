"""LATTICE by the book: Zhang et al., MM 2021, on dense graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, mean_of_layers, softmax, unit
from tests.references.plain_item_graph import cosine, dense_knn, dense_normalised


def graph_on(chosen: Floats, vectors: Floats) -> Floats:
    """Eq. 1 to 3 where the neighbours are chosen already."""
    return dense_normalised(chosen * np.maximum(cosine(vectors), 0))


def projected(p: Parameters, name: str, features: Mapping[str, Floats]) -> Floats:
    """High-level features W f + b."""
    return features[name] @ p[f"projections.{name}"] + p[f"biases.{name}"]


def chosen_now(
    p: Parameters, features: Mapping[str, Floats], present: Mapping[str, Floats], k: int
) -> dict[str, Floats]:
    """The neighbours by the projected features."""
    return {name: dense_knn(projected(p, name, features), present[name], k) for name in features}


def embeddings(
    p: Parameters,
    adjacency: Floats,
    features: Mapping[str, Floats],
    present: Mapping[str, Floats],
    chosen: Mapping[str, Floats],
    *,
    k: int,
    initial_share: float,
    n_layers: int,
    n_item_layers: int = 1,
) -> tuple[Floats, Floats]:
    """LightGCN, plus the unit embeddings from the sum of all item graphs."""
    weights = softmax(p["importance"]) if "importance" in p else [1.0]
    graph = 0.0
    for weight, (name, vectors) in zip(weights, features.items(), strict=True):
        given = graph_on(dense_knn(vectors, present[name], k), vectors)
        learned = graph_on(chosen[name], projected(p, name, features))
        graph = graph + weight * (initial_share * given + (1 - initial_share) * learned)
    latent = np.linalg.matrix_power(graph, n_item_layers) @ p["items"]
    n_users = len(p["users"])
    nodes = mean_of_layers(adjacency, np.concatenate([p["users"], p["items"]]), n_layers)
    return nodes[:n_users], nodes[n_users:] + unit(latent)


def loss(h_users: Floats, h_items: Floats, batch: PlainBatch, l2: float) -> float:
    """BPR, and L2 on the embeddings that are scored."""
    users, items, drawn = batch
    own = half_squares(h_users[users], h_items[items], h_items[drawn])
    return bpr(h_users, h_items, batch) + l2 / len(users) * own
