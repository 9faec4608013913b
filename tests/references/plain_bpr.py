"""BPR-MF by the book: Rendle et al., UAI 2009, one triple at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PlainBatch = tuple[Ints, Ints, Ints]
"""(B,) users, (B,) positives, (B, N) negatives."""


def sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


def train_bpr(
    users: Floats,
    items: Floats,
    item_bias: Floats,
    batches: Sequence[PlainBatch],
    *,
    learning_rate: float,
    l2: float,
    learns_bias: bool,
) -> list[float]:
    """Take one SGD step per batch on the arrays in place; return the loss of each batch before its step."""
    losses = []
    for batch_users, positives, negatives in batches:
        n_rows, n_negatives = negatives.shape
        loss = 0.0
        d_users, d_items, d_bias = np.zeros_like(users), np.zeros_like(items), np.zeros_like(item_bias)
        for u, i, drawn in zip(batch_users, positives, negatives, strict=True):
            for j in drawn:
                x_uij = users[u] @ items[i] + item_bias[i] - users[u] @ items[j] - item_bias[j]
                loss -= np.log(sigmoid(x_uij)) / (n_rows * n_negatives)
                slope = -sigmoid(-x_uij) / (n_rows * n_negatives)  # of -ln sigmoid(x)
                d_users[u] += slope * (items[i] - items[j])
                d_items[i] += slope * users[u]
                d_items[j] -= slope * users[u]
                d_bias[i] += slope
                d_bias[j] -= slope
            d_users[u] += l2 / n_rows * users[u]
            loss += 0.5 * l2 / n_rows * float(users[u] @ users[u])
            for item in (i, *drawn):
                d_items[item] += l2 / n_rows * items[item]
                d_bias[item] += l2 / n_rows * item_bias[item]
                loss += 0.5 * l2 / n_rows * float(items[item] @ items[item] + item_bias[item] ** 2)
        users -= learning_rate * d_users
        items -= learning_rate * d_items
        if learns_bias:
            item_bias -= learning_rate * d_bias
        losses.append(float(loss))
    return losses
