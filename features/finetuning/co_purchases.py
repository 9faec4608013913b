"""Items that the same users interacted with: which pairs are drawn, and which are no negatives."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from features.errors import FeatureError

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CoPurchases:
    """What training interactions say of the items, as arrays; the caller hands in no other interactions.

    Args:
        pairs: (P, 2) item rows of each pair that may be drawn.
        weights: (P,) above 0; a pair is drawn in proportion to it.
        user_rows: (E,) user of each training interaction.
        item_rows: (E,) its item.
        n_items: Items of the catalogue.

    Raises:
        ValueError: Arrays that do not belong together.
    """

    pairs: Int64Array
    weights: NDArray[np.float64]
    user_rows: Int64Array
    item_rows: Int64Array
    n_items: int

    def __post_init__(self) -> None:
        fits = self.pairs.shape == (len(self.weights), 2) and self.user_rows.shape == self.item_rows.shape
        if not fits or (len(self.weights) and self.weights.min() <= 0):
            raise ValueError(
                f"pairs {self.pairs.shape}, weights {self.weights.shape} above 0, users "
                f"{self.user_rows.shape} and items {self.item_rows.shape} do not belong together."
            )

    def among(self, rows: Int64Array) -> "CoPurchases":
        """The pairs of which both items are among ``rows``; all interactions stay.

        Raises:
            FeatureError: There is none.
        """
        allowed = np.zeros(self.n_items, dtype=bool)
        allowed[rows] = True
        kept = allowed[self.pairs].all(axis=1)
        if not kept.any():
            raise FeatureError(
                f"none of {len(self.pairs)} pairs of items that users share lies among the {len(rows)} items "
                "to train on; set objectives.co_purchase to 0, or give a dataset with more interactions."
            )
        return CoPurchases(self.pairs[kept], self.weights[kept], self.user_rows, self.item_rows, self.n_items)

    def draw(self, n_pairs: int, rng: np.random.Generator) -> Int64Array:
        """(n_pairs, 2) pairs in proportion to their weights, with repetition; ends in random order."""
        places = np.searchsorted(self._upto, rng.random(n_pairs) * self._upto[-1], side="right")
        drawn = self.pairs[np.minimum(places, len(self.pairs) - 1)]
        turned = rng.random(n_pairs) < 0.5
        ends: Int64Array = np.where(turned[:, None], drawn[:, ::-1], drawn)
        return ends

    def together(self, left: Int64Array, right: Int64Array) -> NDArray[np.bool_]:
        """(A,) and (B,) item rows -> (A, B): which any user interacted with both of, or are one item."""
        common = np.asarray((self._users[left] @ self._users[right].T).todense()) > 0
        same: NDArray[np.bool_] = common | (left[:, None] == right[None, :])
        return same

    @cached_property
    def _upto(self) -> NDArray[np.float64]:
        return np.cumsum(self.weights)

    @cached_property
    def _users(self) -> sparse.csr_matrix:
        """(I, U), above 0 where a user interacted with an item."""
        n_users = int(self.user_rows.max(initial=-1)) + 1
        ones = np.ones(len(self.item_rows), dtype=np.float32)
        return sparse.csr_matrix((ones, (self.item_rows, self.user_rows)), (self.n_items, n_users))


def co_purchase_loss(left: Tensor, right: Tensor, temperature: float, ignored: Tensor) -> Tensor:
    """InfoNCE in both directions: which of the right ends was bought together with a left end.

    Args:
        left: (P, D) vectors of any length; they are normalised here.
        right: (P, D); row p belongs with ``left[p]``.
        temperature: Fixed.
        ignored: (P, P) bool: pairs that are no negatives, as they were bought together too. The diagonal
            counts as the positives whatever it says.

    Returns:
        Mean loss of a pair in nats.
    """
    logits = normalize(left, dim=1) @ normalize(right, dim=1).T / temperature
    own = torch.arange(len(logits), device=logits.device)
    others = ignored & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(others, -torch.inf)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
