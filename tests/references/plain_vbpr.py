"""VBPR by the book: He and McAuley, AAAI 2016, one triple at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tests.references.plain_bpr import Floats, PlainBatch, sigmoid


@dataclass
class PlainVbpr:
    """The parameters of eq. 1, named as there; E is (A, F) and the features of an item one vector."""

    item_bias: Floats
    gamma_users: Floats
    gamma_items: Floats
    theta_users: Floats
    E: Floats
    content_bias: Floats

    def score(self, user: int, item: int, features: Floats) -> float:
        """Eq. 1 without alpha and the user's bias, which BPR cancels."""
        return float(
            self.item_bias[item]
            + self.gamma_users[user] @ self.gamma_items[item]
            + self.theta_users[user] @ (self.E @ features[item])
            + self.content_bias @ features[item]
        )


def train_vbpr(
    model: PlainVbpr,
    features: Floats,
    batches: Sequence[PlainBatch],
    *,
    learning_rate: float,
    l2: float,
    l2_projection: float,
) -> list[float]:
    """Take one SGD step per batch in place; return the loss of each batch before its step."""
    losses = []
    for users, positives, negatives in batches:
        n_rows, n_negatives = negatives.shape
        loss = 0.5 * l2_projection * float((model.E**2).sum() + (model.content_bias**2).sum())
        slopes = PlainVbpr(*(np.zeros_like(getattr(model, part.name)) for part in fields(model)))
        slopes.E += l2_projection * model.E
        slopes.content_bias += l2_projection * model.content_bias
        for u, i, drawn in zip(users, positives, negatives, strict=True):
            for j in drawn:
                x_uij = model.score(u, i, features) - model.score(u, j, features)
                loss -= np.log(sigmoid(x_uij)) / (n_rows * n_negatives)
                slope = -sigmoid(-x_uij) / (n_rows * n_negatives)
                contrast = features[i] - features[j]
                slopes.item_bias[i] += slope
                slopes.item_bias[j] -= slope
                slopes.gamma_users[u] += slope * (model.gamma_items[i] - model.gamma_items[j])
                slopes.gamma_items[i] += slope * model.gamma_users[u]
                slopes.gamma_items[j] -= slope * model.gamma_users[u]
                slopes.theta_users[u] += slope * (model.E @ contrast)
                slopes.E += slope * np.outer(model.theta_users[u], contrast)
                slopes.content_bias += slope * contrast
            decayed = [(part, u) for part in ("gamma_users", "theta_users")]
            decayed += [(part, item) for item in (i, *drawn) for part in ("gamma_items", "item_bias")]
            for part, row in decayed:
                value = getattr(model, part)[row]
                getattr(slopes, part)[row] += l2 / n_rows * value
                loss += 0.5 * l2 / n_rows * float(np.sum(value**2))
        for part in fields(model):
            array = getattr(model, part.name)
            array -= learning_rate * getattr(slopes, part.name)
        losses.append(float(loss))
    return losses
