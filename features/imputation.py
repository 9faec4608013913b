"""Vectors for items that have none: zeros, the mean, their neighbours in another modality, propagation.

Which rows got a vector stays known: a rule may reach no item that is near, and such rows stay zero.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from features.errors import FeatureError
from features.knn import nearest_candidates
from features.transforms import unit_length

Float64Array = npt.NDArray[np.float64]

_BLOCK_NUMBERS = 2**22
"""Numbers held at once in float64 beside the result: 32 MiB."""


class Filled(NamedTuple):
    """A table whose absent rows were filled as far as the rule goes."""

    vectors: Tensor
    """(I, F); zeros where the rule had nothing to fill with."""
    known: Tensor
    """(I,) bool: rows that are present or were filled."""


class Part(NamedTuple):
    """One modality's vectors, as far as they are present."""

    vectors: Tensor
    """(I, F)."""
    present: Tensor
    """(I,) bool."""


def fill_absent(vectors: Tensor, present: Tensor, how: Literal["zero", "mean"] = "zero") -> Filled:
    """Give the absent rows zeros, which leaves them unknown, or the mean of the rows that are present.

    Args:
        vectors: (I, F).
        present: (I,) bool.
        how: What absent rows get.

    Raises:
        FeatureError: The mean is asked for and no row is present.
    """
    filled = vectors.clone()
    filled[~present] = 0
    if how == "zero" or bool(present.all()):
        return Filled(filled, present.clone())
    if not present.any():
        raise FeatureError(
            f"none of the {len(present)} items has a vector, so there is no mean to fill with; expected "
            "at least one; check the catalogue, or fill with zero."
        )
    filled[~present] = vectors[present].double().mean(dim=0).to(vectors.dtype)
    return Filled(filled, torch.ones_like(present))


def fill_from_neighbours(vectors: Tensor, present: Tensor, others: Sequence[Part], k: int) -> Filled:
    """Give an absent row the mean of the vectors of the items nearest to it in the other modalities.

    Nearness is the cosine in the other modalities that the item has, their mean where it has several. Only
    items that have all of these and the missing modality are candidates; where no item has them all, the
    first single modality in which there is a candidate decides. The search is exact, in blocks.

    Args:
        vectors: (I, F) of the modality that is filled.
        present: (I,) bool.
        others: The other modalities, over the same items.
        k: Neighbours; where there are fewer candidates, all of them.

    Returns:
        The filled table; an item without any modality, or without candidates, keeps zeros and is not known.
    """
    filled = vectors.clone()
    filled[~present] = 0
    known = present.clone()
    if not others:
        return Filled(filled, known)
    has = torch.stack([part.present for part in others], dim=1)  # (I, M)
    for pattern in torch.unique(has[~present], dim=0).tolist():
        own = [number for number, there in enumerate(pattern) if there]
        rows = (~present & (has == torch.tensor(pattern)).all(dim=1)).nonzero()[:, 0]
        for used in [own, *([number] for number in own)]:
            candidates = (present & has[:, used].all(dim=1)).nonzero()[:, 0]
            if used and len(candidates):
                near = nearest_candidates(_joined([others[number] for number in used]), rows, candidates, k)
                filled[rows] = _means(vectors, near.neighbours)
                known[rows] = True
                break
    return Filled(filled, known)


def propagate(vectors: Tensor, present: Tensor, interactions: sparse.csr_matrix, n_steps: int) -> Filled:
    """Fill absent rows from the items that the same users interacted with, again and again.

    One step is x <- B^T B x with B = Du^-1/2 R Di^-1/2, from items to users and back, after which the present
    rows are set to what they were; absent rows begin with zeros. Only the users of absent items take part,
    and what the present rows send is computed once, as it never changes. No I x I matrix is formed.

    Args:
        vectors: (I, F).
        present: (I,) bool.
        interactions: R, (U, I), not negative: what users did in *training*. Whatever else it held would leak.
        n_steps: Steps, 1 or more.

    Returns:
        The filled table; an item that no path of at most ``n_steps`` steps joins to a present one keeps zeros
        and is not known.

    Sources: Rossi et al., "On the Unreasonable Effectiveness of Feature Propagation in Learning on Graphs
    with Missing Node Features", LoG 2022 (arXiv 2111.12128), algorithm 1; for recommenders Malitesta et al.,
    "Do We Really Need to Drop Items with Missing Modalities in Multimodal Recommendation?", CIKM 2024
    (arXiv 2408.11767), on an item graph that is formed.
    """
    there = present.numpy()
    users, items = interactions.sum(axis=1), interactions.sum(axis=0)
    weights = (
        sparse.diags_array(_inverse_root(users)) @ interactions @ sparse.diags_array(_inverse_root(items))
    )
    absent_weights = sparse.csr_matrix(weights)[:, ~there]
    used = np.flatnonzero(np.diff(absent_weights.indptr))
    absent_weights = absent_weights[used]  # (U', A)
    present_weights = sparse.csr_matrix(weights)[used][:, there]  # (U', P)

    def spread(sent: Float64Array) -> Float64Array:
        """(P, C) rows of present items -> (A, C) rows of absent ones."""
        constant: Float64Array = absent_weights.T @ (present_weights @ sent)
        found = constant
        for _ in range(n_steps - 1):
            found = constant + absent_weights.T @ (absent_weights @ found)
        return found

    filled = vectors.clone()
    filled[~present] = 0
    rows, absent_rows = present.nonzero()[:, 0], (~present).nonzero()[:, 0]
    known = present.clone()
    known[absent_rows] = torch.from_numpy(spread(np.ones((len(rows), 1)))[:, 0] > 0)
    width = max(1, _BLOCK_NUMBERS // max(len(present), len(used), 1))
    for start in range(0, vectors.shape[1], width):
        place = slice(start, start + width)
        found = spread(vectors[rows, place].double().numpy())
        filled[absent_rows, place] = torch.from_numpy(found).to(vectors.dtype)
    return Filled(filled, known)


def _joined(parts: Sequence[Part]) -> Tensor:
    """Return (I, F) vectors whose cosine is the mean of the parts' cosines, where an item has all parts."""
    if len(parts) == 1:
        return parts[0].vectors
    return torch.cat([unit_length(part.vectors.float()) for part in parts], dim=1)


def _means(vectors: Tensor, neighbours: Tensor) -> Tensor:
    """Return (B, F) means over the (B, k) neighbours that are not -1."""
    means = torch.empty((len(neighbours), vectors.shape[1]), dtype=vectors.dtype)
    step = max(1, _BLOCK_NUMBERS // (neighbours.shape[1] * vectors.shape[1]))
    for start in range(0, len(neighbours), step):
        rows = slice(start, start + step)
        there = neighbours[rows] >= 0  # (B, k)
        near = vectors[neighbours[rows].clamp(min=0)].double() * there.unsqueeze(2)
        means[rows] = (near.sum(dim=1) / there.sum(dim=1, keepdim=True)).to(vectors.dtype)
    return means


def _inverse_root(degrees: npt.ArrayLike) -> Float64Array:
    """Return 1 / sqrt of each degree, 0 for none."""
    flat = np.asarray(degrees, dtype=np.float64).ravel()
    return np.divide(1.0, np.sqrt(flat), out=np.zeros_like(flat), where=flat > 0)
