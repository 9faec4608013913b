"""EASE: a linear autoencoder of a user's history, solved in closed form.

Source: Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from scipy.linalg import lapack
from torch import Tensor
from torch.nn.functional import embedding_bag
from typing_extensions import override

from recommenders.errors import RecommenderError
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Float32Array, Interactions
from recommenders.models.base import Recommender, Scorer
from recommenders.ranges import Between, Range

_BYTES_PER_CELL = 12
"""At the peak: the Gram matrix in float64, inverted in its own memory, and the weights in float32."""


SEARCH: dict[str, Range] = {"l2": Between(low=10.0, high=10_000.0, log=True)}
"""A power of ten and more on both sides of what Steck found (sec. 4.2)."""


class EaseConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of EASE."""

    l2: PositiveFloat = Field(
        500.0, description="Lambda of eq. 8; Steck found 200 to 1000 on his three data sets (sec. 4.2)."
    )
    max_items: PositiveInt = Field(
        20_000, description="Most items to invert an I x I matrix for; 12 bytes a cell, 4.8 GB at 20,000."
    )


class Ease(Recommender):
    """Score of item j for user u: the sum of B_ij over u's training items i.

    P = (X' X + lambda)^-1 of the training matrix X; B_ij = -P_ij / P_jj off the diagonal and 0 on it (eq. 8).

    Raises:
        RecommenderError: There are more than ``max_items`` items.
    """

    scoring = "neighbours"

    weights: Tensor
    history_starts: Tensor
    history_items: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: EaseConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        if train.n_items > config.max_items:
            gigabytes = train.n_items**2 * _BYTES_PER_CELL / 1e9
            raise RecommenderError(
                f"ease inverts an I x I matrix, and {train.n_items:,} items take {gigabytes:,.1f} GB; "
                f"max_items allows {config.max_items:,} items. Raise max_items if there is that much memory, "
                "or choose itemknn, whose lists are sparse."
            )
        history = train.csr()
        arrays = {
            "weights": _item_weights(train, config.l2),
            "history_starts": history.indptr.astype(np.int64),
            "history_items": history.indices.astype(np.int64),
        }
        for name, values in arrays.items():  # not saved: they follow from the dataset
            self.register_buffer(name, torch.from_numpy(values), persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Raise: as embeddings the factors would be a user's whole history and B, I numbers each."""
        raise TypeError("Ease has no embeddings; ask its scorer(features) for scores.")

    @override
    def scorer(self, features: FeatureTable) -> Scorer:
        """Return what adds up the rows of B of a user's items."""

        def score(users: Tensor) -> Tensor:
            starts, stops = self.history_starts[users], self.history_starts[users + 1]
            lengths = stops - starts
            first = torch.cumsum(lengths, dim=0) - lengths  # where each user's items begin in the bag
            steps = torch.arange(int(lengths.sum()), device=users.device)
            places = steps + torch.repeat_interleave(starts - first, lengths)
            return embedding_bag(self.history_items[places], self.weights, first, mode="sum")

        return score


def _item_weights(train: Interactions, l2: float) -> Float32Array:
    """Return B, (I, I) float32, by a Cholesky factor that is inverted where it lies."""
    matrix = train.csr().astype(np.float64)
    gram = np.asarray((matrix.T @ matrix).toarray(order="F"))
    gram[np.diag_indices_from(gram)] += l2
    factor, info = lapack.dpotrf(gram, overwrite_a=True)
    inverse: NDArray[np.float64]
    inverse, info_of_inverse = lapack.dpotri(factor, overwrite_c=True)  # the upper triangle only
    if info or info_of_inverse:
        raise RecommenderError(f"The Gram matrix plus l2 = {l2} has no inverse in float64. Raise l2.")
    weights = np.empty(inverse.shape, dtype=np.float32)
    for item in range(train.n_items):
        weights[:item, item] = -inverse[:item, item] / inverse[item, item]
        weights[item:, item] = -inverse[item, item:] / inverse[item, item]
    np.fill_diagonal(weights, 0)
    return weights
