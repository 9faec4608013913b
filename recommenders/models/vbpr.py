"""VBPR: matrix factorisation with a second inner product, of the user's taste and the item's content.

Source: He and McAuley, "VBPR: Visual Bayesian personalized ranking from implicit feedback", AAAI 2016.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.ranges import Range
from recommenders.sampling import Batch

SEARCH: dict[str, Range] = {
    "l2": (2.0, 1.0, 0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-5),
    "l2_projection": (0.0, 1e-4, 1e-3, 1e-2),
    "training.learning_rate": (1e-4, 5e-4, 1e-3, 5e-3),
}
"""l2 as in MMRec's configuration, with the default below; the learning rate as BPR-MF's, so that both get the
same chance; l2_projection, which the paper has at 0, from there to ten times the default below."""


class VbprConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of VBPR."""

    dim: PositiveInt = Field(64, description="Length K of the latent factors gamma of users and items.")
    content_dim: PositiveInt = Field(64, description="Length A that features are projected to.")
    l2: NonNegativeFloat = Field(
        0.05, description="Weight of the squared length of the factors and biases in a batch."
    )
    l2_projection: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of the projection E and the content bias."
    )


class Vbpr(Recommender):
    """x_ui = b_i + gamma_u . gamma_i + theta_u . E f_i + beta' . f_i (eq. 1 and 2).

    The offset alpha and the user's bias of eq. 1 are the same for both items of a pair: BPR cancels them, and
    they rank nothing. f_i is the concatenation of the item's modalities, so that E f_i is the sum of one
    projection per modality; an absent modality whose row is zero adds nothing.

    Loss of a batch of B rows (u, i, j...): BPR, plus l2 / 2 times the mean over rows of the squares of all
    factors and biases of u, i and j, plus l2_projection / 2 times the squares of E and beta', of which every
    row uses all. gamma, theta and E start from Xavier's uniform distribution, biases at 0. (E and theta must
    not both start at 0: the gradient of each is a multiple of the other.)

    The defaults were chosen on validation in a simulation (1,500 users, 1,000 items, choices caused by two
    modalities): with l2_projection 0, E fits noise, and random features cost half of the Recall@20 of BPR-MF.
    """

    needs_features = True

    def __init__(
        self, train: Interactions, features: FeatureTable, config: VbprConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.l2 = config.l2
        self.l2_projection = config.l2_projection
        self.content_dim = config.content_dim
        # [gamma_u, theta_u]: each drawn as a matrix of its own, kept as one, as a step then costs less.
        factors = xavier_uniform(rng, self.n_users, config.dim)
        self.item_factors = xavier_uniform(rng, self.n_items, config.dim)  # gamma_i
        tastes = xavier_uniform(rng, self.n_users, config.content_dim)
        self.users = nn.Parameter(torch.cat([factors.data, tastes.data], dim=1))
        self.item_bias = nn.Parameter(torch.zeros(self.n_items))  # b_i
        # Modality to (F_m, A + 1): its columns of E transposed, and its part of beta' as the last column.
        self.projections = nn.ParameterDict(
            {
                name: nn.Parameter(pad(xavier_uniform(rng, width, config.content_dim).data, (0, 1)))
                for name, width in features.dims.items()
            }
        )

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return [gamma_u, theta_u, 1] and [gamma_i, E f_i, b_i + beta' . f_i]: eq. 1 is their product."""
        items = self._items(self.item_factors, self.item_bias, features.vectors)
        return pad(self.users, (0, 1), value=1.0), items

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2, touching only the batch's rows and projecting each of its items once."""
        distinct, places, counts = torch.unique(batch_items(batch), return_inverse=True, return_counts=True)
        vectors = {name: rows_of(features.vectors[name], distinct) for name in self.projections}
        factors, bias = rows_of(self.item_factors, distinct), rows_of(self.item_bias, distinct)
        items = rows_of(self._items(factors, bias, vectors), places)  # (B, 1 + N, K + A + 1)
        users = rows_of(self.users, batch.users)
        scores = pair_scores(pad(users, (0, 1), value=1.0), items)
        often = counts.to(factors.dtype).sqrt()  # a row that comes n times counts n times
        learnt = [users, often.unsqueeze(1) * factors, often * bias]
        penalty = self.l2 / len(users) * half_squared_norm(*learnt)
        if self.l2_projection:
            penalty = penalty + self.l2_projection * half_squared_norm(*self.projections.values())
        return bpr_loss(scores) + penalty

    def _items(self, factors: Tensor, bias: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return [gamma_i, E f_i, b_i + beta' . f_i], (R, K + A + 1), of R items."""
        content = pad(bias.unsqueeze(1), (self.content_dim, 0))
        for name, matrix in self.projections.items():
            content = torch.addmm(content, vectors[name].to(matrix.dtype), matrix)
        return torch.cat([factors, content], dim=1)
