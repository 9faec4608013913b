"""MMGCL by the book: Yi et al., SIGIR 2022, on dense graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bpr, half_squares, unit
from tests.references.plain_modality_encoder import embeddings, inputs, propagated, read


def told_apart(anchors: Floats, counterparts: Floats, others: Floats, temperature: float) -> float:
    """Mean of -ln of the share of each anchor's counterpart among all counterparts and others, by cosine."""
    candidates = unit(np.concatenate([counterparts, others]))
    total = 0.0
    for row, anchor in enumerate(unit(anchors)):
        shares = np.exp(candidates @ anchor / temperature)
        total -= np.log(shares[row] / shares.sum())
    return total / len(anchors)


def loss(
    p: Parameters,
    adjacency: Floats,
    thinned: Floats,
    features: Mapping[str, Floats],
    batch: PlainBatch,
    draws: tuple[int, Floats, int],
    *,
    n_layers: int,
    contrast: str,
    ssl_weight: float,
    temperature: float,
    l2: float,
) -> float:
    masked, noise, swapped = draws
    users, positives, drawn = batch
    tables = inputs(p, features)
    first_users, first_items = propagated(p, thinned, tables, n_layers)
    second = [noise if place == masked else table for place, table in enumerate(tables)]
    second_users, second_items = propagated(p, adjacency, second, n_layers)

    distinct = np.unique(positives)
    negatives = np.array([drawn[np.flatnonzero(positives == item)[0], 0] for item in distinct])
    challenging = [part[distinct] for part in second_items]
    challenging[swapped] = second_items[swapped][negatives]
    hard = read(p, "items", challenging)

    z_users = [read(p, "users", first_users), read(p, "users", second_users)]
    z_items = [read(p, "items", first_items), read(p, "items", second_items)]
    if contrast == "views":
        rows = np.unique(users)
        none = np.zeros((0, hard.shape[1]))
        ssl = told_apart(z_users[0][rows], z_users[1][rows], none, temperature)
        ssl += told_apart(z_items[0][distinct], z_items[1][distinct], hard, temperature)
    else:
        ssl = sum(
            told_apart(of_users[users], of_items[positives], hard, temperature)
            for of_users, of_items in zip(z_users, z_items, strict=True)
        )
    ids = p["encoder.items"]
    own = half_squares(p["encoder.users"][users], ids[positives], ids[drawn])
    final = embeddings(p, adjacency, features, n_layers)
    return bpr(*final, batch) + ssl_weight * ssl + l2 / len(users) * own
