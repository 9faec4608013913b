"""PGL by the book: Yu et al., AAAI 2025, on dense matrices, without dropout."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, info_nce, mean_of_layers, symmetric, unit


def embed(
    p: Parameters, adjacency: Floats, features: dict[str, Floats], item_graph: Floats, n_layers: int
) -> tuple[Floats, Floats]:
    items = np.hstack(
        [
            unit(table @ p[f"projections.{name}.weight"] + p[f"projections.{name}.bias"])
            for name, table in features.items()
        ]
    )
    users = p["users"]
    mean = mean_of_layers(adjacency, np.vstack([users, items]), n_layers)
    return mean[: len(users)], mean[len(users) :] + item_graph @ items


def low_rank(matrix: Floats, n_components: int) -> Floats:
    """(U + I, U + I), with the principal components of the normalised matrix in its corners."""
    left, values, right = np.linalg.svd(symmetric(matrix), full_matrices=False)
    kept = (left[:, :n_components] * values[:n_components]) @ right[:n_components]
    users, items = matrix.shape
    return np.block([[np.zeros((users, users)), kept], [kept.T, np.zeros((items, items))]])


def loss(
    p: Parameters,
    users: Floats,
    items: Floats,
    batch: PlainBatch,
    contrast_weight: float,
    temperature: float,
    l2: float,
) -> float:
    rows, positives, _ = batch
    views = [users[np.unique(rows)], items[np.unique(positives)]]
    contrast = np.mean([info_nce(view, view, temperature) for view in views])
    own = l2 / len(rows) * half_squares(p["users"][rows])
    return bpr(users, items, batch) + contrast_weight * contrast + own
