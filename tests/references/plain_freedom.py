"""FREEDOM by the book: Zhou and Shen, MM 2023, on dense graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, mean_of_layers
from tests.references.plain_item_graph import dense_knn, dense_normalised


def item_graph(
    features: Mapping[str, Floats], present: Mapping[str, Floats], shares: Mapping[str, float], k: int
) -> Floats:
    """Unweighted nearest items of each modality, normalised, blended."""
    return sum(
        shares[name] * dense_normalised(dense_knn(features[name], present[name], k)) for name in features
    )


def embeddings(p: Parameters, adjacency: Floats, graph: Floats, n_layers: int) -> tuple[Floats, Floats]:
    """LightGCN on users and items, plus the items smoothed over their graph."""
    n_users = len(p["users"])
    nodes = mean_of_layers(adjacency, np.concatenate([p["users"], p["items"]]), n_layers)
    return nodes[:n_users], nodes[n_users:] + graph @ p["items"]


def loss(
    p: Parameters,
    batch: PlainBatch,
    adjacency: Floats,
    graph: Floats,
    features: Mapping[str, Floats],
    *,
    n_layers: int,
    feature_weight: float,
    l2: float,
) -> float:
    """BPR on embeddings and on features, with L2 on the parameters of the batch."""
    users, items, drawn = batch
    h_users, h_items = embeddings(p, adjacency, graph, n_layers)
    total = bpr(h_users, h_items, batch)
    for name, vectors in features.items():
        total += feature_weight * bpr(h_users, vectors @ p[f"projections.{name}"], batch)
    own = half_squares(p["users"][users], p["items"][items], p["items"][drawn])
    return total + l2 / len(users) * own
