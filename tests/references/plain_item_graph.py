"""Item graphs by the book: dense matrices, item by item, in float64.

Source: Zhang et al., "Mining latent structures for multimedia recommendation", MM 2021, eq. 1 to 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.references.plain_bpr import Floats


def cosine(vectors: Floats) -> Floats:
    """Return (I, I) cosines, 0 for rows of zeros."""
    lengths = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(lengths > 0, lengths, 1)[:, None]
    return np.asarray(unit @ unit.T)


def dense_knn(vectors: Floats, present: NDArray[np.bool_], k: int) -> Floats:
    """Return (I, I) ones where column j is among the k most similar of row i, itself included."""
    similarity = cosine(vectors)
    chosen = np.zeros_like(similarity)
    for i in np.flatnonzero(present):
        candidates = sorted(np.flatnonzero(present), key=lambda j: (j != i, -similarity[i, j]))
        chosen[i, candidates[:k]] = 1
    return chosen


def dense_normalised(matrix: Floats) -> Floats:
    """Return D^-1/2 S D^-1/2 with the row sums of S in D; empty rows stay empty."""
    degrees = matrix.sum(axis=1)
    result = np.zeros_like(matrix)
    for i, j in zip(*np.nonzero(matrix), strict=True):
        result[i, j] = matrix[i, j] / np.sqrt(degrees[i] * degrees[j])
    return result
