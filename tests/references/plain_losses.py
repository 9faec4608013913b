"""Losses of a batch, written as the papers write them: one term at a time, in float64."""

from __future__ import annotations

from math import exp, log

import numpy as np


def plain_bce(scores: np.ndarray) -> float:
    """Binary cross-entropy with label 1 in column 0 and 0 elsewhere."""
    terms = []
    for row in scores:
        for column, score in enumerate(row):
            chance = 1 / (1 + exp(-score))
            terms.append(-log(chance if column == 0 else 1 - chance))
    return sum(terms) / len(terms)


def plain_softmax(scores: np.ndarray, temperature: float) -> float:
    """Cross-entropy of column 0 among the columns of each row."""
    terms = [
        -log(exp(row[0] / temperature) / sum(exp(score / temperature) for score in row)) for row in scores
    ]
    return sum(terms) / len(terms)


def plain_in_batch_softmax(
    users: np.ndarray, items: np.ndarray, temperature: float, log_q: np.ndarray, taken: np.ndarray
) -> float:
    """The same among the batch's items, corrected for how often each is in a batch; own items left out."""
    terms = []
    for b, user in enumerate(users):
        values = {}
        for c, item in enumerate(items):
            if c == b or not taken[b, c]:
                values[c] = exp(float(user @ item) / temperature - log_q[c])
        terms.append(-log(values[b] / sum(values.values())))
    return sum(terms) / len(terms)


def plain_directau(users: np.ndarray, items: np.ndarray, gamma: float) -> float:
    """Alignment of pairs plus gamma times the mean uniformity of users and of items."""
    users, items = ([row / np.sqrt((row**2).sum()) for row in rows] for rows in (users, items))
    alignment = sum(float(((u - i) ** 2).sum()) for u, i in zip(users, items, strict=True)) / len(users)
    uniformities = []
    for rows in (users, items):
        values = [
            exp(-2 * float(((x - y) ** 2).sum()))
            for b, x in enumerate(rows)
            for c, y in enumerate(rows)
            if b < c
        ]
        uniformities.append(log(sum(values) / len(values)))
    return alignment + gamma * sum(uniformities) / 2
