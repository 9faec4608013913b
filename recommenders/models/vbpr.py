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
from recommenders.losses import bpr_loss_of_leads, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_minus_first, rows_of, xavier_uniform
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
        content = self._content(features.vectors) + pad(self.item_bias.unsqueeze(1), (self.content_dim, 0))
        return pad(self.users, (0, 1), value=1.0), torch.cat([self.item_factors, content], dim=1)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2, touching only the batch's rows.

        As eq. 1 is linear in the item, a pair's two scores differ by the score of the items' difference. So
        features are subtracted first, and each pair is projected once: B N rows, not those of both items.
        """
        rows = batch_items(batch)
        users = rows_of(self.users, batch.users)
        factors, bias = rows_of(self.item_factors, rows), rows_of(self.item_bias, rows)
        content = self._content_lead(rows, features)
        dim = factors.shape[-1]
        # x_uj - x_ui, (B, N): the factors', the content's and the biases' share.
        leads = pair_scores(users[:, :dim], factors[:, 1:] - factors[:, :1])
        leads = leads + pair_scores(users[:, dim:], content[..., :-1]) + content[..., -1]
        leads = leads + bias[:, 1:] - bias[:, :1]
        penalty = self.l2 / len(users) * half_squared_norm(users, factors, bias)
        if self.l2_projection:
            penalty = penalty + self.l2_projection * half_squared_norm(*self.projections.values())
        return bpr_loss_of_leads(leads) + penalty

    def _content_lead(self, rows: Tensor, features: FeatureTable) -> Tensor:
        """Return [E (f_j - f_i), beta' (f_j - f_i)], (B, N, A + 1), of rows (B, 1 + N) of i and its N j."""
        n_pairs, n_negatives = len(rows), rows.shape[1] - 1
        if self.n_items <= n_pairs * n_negatives:  # then all items are fewer than the pairs
            items = rows_of(self._content(features.vectors), rows)
            return items[:, 1:] - items[:, :1]
        return self._content(
            {name: rows_minus_first(features.vectors[name], rows) for name in self.projections}
        ).reshape(n_pairs, n_negatives, -1)

    def _content(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return [E f, beta' f], (R, A + 1), of R rows of features."""
        tables = ((vectors[name].to(matrix.dtype), matrix) for name, matrix in self.projections.items())
        first, matrix = next(tables)  # a table without modalities is refused before
        content: Tensor = first @ matrix
        for table, matrix in tables:
            content = torch.addmm(content, table, matrix)
        return content
