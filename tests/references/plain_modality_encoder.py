"""LightGCN on ids and on each modality, read out by one linear layer, on a dense graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats
from tests.references.plain_graphs import mean_of_layers


def affine(p: Parameters, name: str, x: Floats) -> Floats:
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def inputs(p: Parameters, features: Mapping[str, Floats]) -> list[Floats]:
    """The items' layer 0: ids, then each modality."""
    projected = [affine(p, f"encoder.projections.{name}", table) for name, table in features.items()]
    return [p["encoder.items"], *projected]


def propagated(
    p: Parameters, adjacency: Floats, tables: Sequence[Floats], n_layers: int
) -> tuple[list[Floats], list[Floats]]:
    """The parts of users and of items, one table at a time."""
    n_users = len(p["encoder.users"])
    nodes = [
        mean_of_layers(adjacency, np.concatenate([p["encoder.users"], table]), n_layers) for table in tables
    ]
    return [part[:n_users] for part in nodes], [part[n_users:] for part in nodes]


def read(p: Parameters, side: str, parts: Sequence[Floats]) -> Floats:
    return affine(p, f"encoder.read_{side}", np.concatenate(parts, axis=1))


def embeddings(
    p: Parameters, adjacency: Floats, features: Mapping[str, Floats], n_layers: int
) -> tuple[Floats, Floats]:
    users, items = propagated(p, adjacency, inputs(p, features), n_layers)
    return read(p, "users", users), read(p, "items", items)
