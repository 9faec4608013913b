"""SLMRec by the book: Tao et al., TMM 2022, on a dense graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, info_nce
from tests.references.plain_modality_encoder import affine, embeddings, inputs, propagated, read


def products_nce(one: Floats, other: Floats, temperature: float) -> float:
    """InfoNCE by inner products."""
    shares = np.exp(one @ other.T / temperature)
    return float(np.mean(-np.log(np.diag(shares) / shares.sum(axis=1))))


def fine_and_coarse(
    p: Parameters, parts: list[Floats], rows: np.ndarray, temperature: float, *, cosine: bool
) -> float:
    """Each modality's part against what the ids and the modalities before it were mapped to."""
    total, coarse = 0.0, parts[0][rows]
    for place, part in enumerate(parts[1:]):
        coarse = affine(p, f"to_coarse.{place}", coarse)
        fine = affine(p, f"to_fine.{place}", part[rows])
        total += (info_nce if cosine else products_nce)(coarse, fine, temperature)
    return total


def masked_views(
    p: Parameters,
    adjacency: Floats,
    features: Mapping[str, Floats],
    batch: PlainBatch,
    masked: tuple[int, int],
    *,
    n_layers: int,
    temperature: float,
) -> float:
    """Two views, each with one input of the items set to zero."""
    users, items = np.unique(batch[0]), np.unique(batch[1])
    views = []
    for left_out in masked:
        tables = inputs(p, features)
        tables[left_out] = 0 * tables[left_out]
        of_users, of_items = propagated(p, adjacency, tables, n_layers)
        views.append((read(p, "users", of_users)[users], read(p, "items", of_items)[items]))
    return sum(info_nce(one, other, temperature) for one, other in zip(*views, strict=True))


def loss(
    p: Parameters,
    adjacency: Floats,
    features: Mapping[str, Floats],
    batch: PlainBatch,
    contrast: float,
    *,
    n_layers: int,
    main_loss: str,
    temperature: float,
    ssl_weight: float,
    l2: float,
) -> float:
    users, positives, drawn = batch
    z_users, z_items = embeddings(p, adjacency, features, n_layers)
    ids = p["encoder.items"]
    if main_loss == "bpr":
        ranking = bpr(z_users, z_items, batch)
        own = half_squares(p["encoder.users"][users], ids[positives], ids[drawn])
    else:
        ranking = info_nce(z_users[users], z_items[positives], temperature)
        own = half_squares(p["encoder.users"][users], ids[positives])
    return ranking + ssl_weight * contrast + l2 / len(users) * own
