"""VBPR: matrix factorisation with a second inner product, of the user's taste and the item's content.

Source: He and McAuley, "VBPR: Visual Bayesian personalized ranking from implicit feedback", AAAI 2016.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
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
        self.user_factors = xavier_uniform(rng, self.n_users, config.dim)  # gamma_u
        self.item_factors = xavier_uniform(rng, self.n_items, config.dim)  # gamma_i
        self.user_content = xavier_uniform(rng, self.n_users, config.content_dim)  # theta_u
        self.item_bias = nn.Parameter(torch.zeros(self.n_items))  # b_i
        # Modality to (F_m, A), its columns of E transposed, and to (F_m,), its part of beta'.
        self.projections = nn.ParameterDict(
            {name: xavier_uniform(rng, width, config.content_dim) for name, width in features.dims.items()}
        )
        self.content_bias = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(width)) for name, width in features.dims.items()}
        )

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return [gamma_u, theta_u, 1] and [gamma_i, E f_i, b_i + beta' . f_i]: eq. 1 is their product."""
        content, content_bias = self._project(features.vectors)
        bias = self.item_bias + content_bias
        ones = self.user_factors.new_ones(self.n_users, 1)
        users = torch.cat([self.user_factors, self.user_content, ones], dim=1)
        return users, torch.cat([self.item_factors, content, bias.unsqueeze(1)], dim=1)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2, touching only the batch's rows and projecting each of its items once."""
        item_rows = batch_items(batch)  # (B, 1 + N)
        distinct, places = torch.unique(item_rows, return_inverse=True)
        vectors = {name: rows_of(features.vectors[name], distinct) for name in self.projections}
        content, content_bias = self._project(vectors)
        gamma_u, theta_u = rows_of(self.user_factors, batch.users), rows_of(self.user_content, batch.users)
        gamma_i, bias = rows_of(self.item_factors, item_rows), rows_of(self.item_bias, item_rows)
        scores = (
            bias
            + pair_scores(gamma_u, gamma_i)
            + pair_scores(theta_u, rows_of(content, places))
            + rows_of(content_bias, places)
        )
        penalty = self.l2 / len(batch.users) * half_squared_norm(gamma_u, theta_u, gamma_i, bias)
        if self.l2_projection:
            shared = half_squared_norm(*self.projections.values(), *self.content_bias.values())
            penalty = penalty + self.l2_projection * shared
        return bpr_loss(scores) + penalty

    def _project(self, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return E f, (R, A), and beta' . f, (R,), of R items' (R, F_m) vectors by modality."""
        content, bias = [], []
        for name, projection in self.projections.items():
            rows = vectors[name].to(projection.dtype)
            content.append(rows @ projection)
            bias.append(rows @ self.content_bias[name])
        return torch.stack(content).sum(dim=0), torch.stack(bias).sum(dim=0)
