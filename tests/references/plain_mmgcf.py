"""MMGCF by the book: Spillo et al., UMAP 2026, on a dense graph."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bipartite, bpr, half_squares, logistic, mean_of_layers, unit


def embeddings(
    p: Parameters, matrix: Floats, features: dict[str, Floats], n_layers: int, fusion: str, weighting: str
) -> tuple[Floats, Floats]:
    """LightGCN's users, and its items fused one by one with their modalities."""
    n_users = len(matrix)
    nodes = mean_of_layers(bipartite(matrix), p["embeddings"], n_layers)

    def join(parts: list[Floats], layer: str) -> Floats:
        if fusion == "concatenation":
            return np.concatenate(parts) @ p[f"{layer}.weight"]
        return sum(parts) / (len(parts) if fusion == "mean" else 1)

    items = []
    for row, own in enumerate(nodes[n_users:]):
        content = []
        for name, table in features.items():
            projected = table[row] @ p[f"projections.{name}.weight"]
            content.append(projected + p.get(f"projections.{name}.bias", 0))
        if weighting == "learned":
            share = logistic(p["balance"][0])
            items.append(join([share * own] + [(1 - share) * part for part in content], "join_all"))
        elif weighting == "normalised":
            items.append(join([len(content) * unit(own)] + [unit(part) for part in content], "join_all"))
        else:
            one = content[0] if len(content) == 1 else join(content, "join_modalities")
            items.append(join([own, one], "join_all"))
    return nodes[:n_users], np.array(items)


def loss(p: Parameters, final: tuple[Floats, Floats], batch: PlainBatch, l2: float) -> float:
    """BPR, with L2 on the embeddings of the batch."""
    users, positives, drawn = batch
    n_users, x = len(final[0]), p["embeddings"]
    own = half_squares(x[users], x[n_users + positives], x[n_users + drawn])
    return bpr(*final, batch) + l2 / len(users) * own
