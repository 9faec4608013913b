"""Content ItemKNN by the book: Deshpande and Karypis, TOIS 2004, on cosines of content, in loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.references.plain_bpr import Floats


def cosine(a: Floats, b: Floats) -> float:
    lengths = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(a @ b / lengths) if lengths else 0.0


def nearest(features: Floats, item: int, k: int) -> list[tuple[int, float]]:
    """Return the k other items with the largest cosines to one item, best first."""
    others = [(j, cosine(features[item], features[j])) for j in range(len(features)) if j != item]
    return sorted(others, key=lambda pair: -pair[1])[:k]


def item_knn_scores(histories: Sequence[Sequence[int]], features: Floats, k: int) -> Floats:
    """Each item of a user's history gives each of its k nearest items its cosine."""
    scores = np.zeros((len(histories), len(features)))
    for user, history in enumerate(histories):
        for i in history:
            for j, similarity in nearest(features, i, k):
                scores[user, j] += similarity
    return scores
