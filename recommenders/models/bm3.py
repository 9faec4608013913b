"""BM3: two views of each embedding, one of them dropped out, drawn together without any negative.

Source: Zhou, Zhou, Liu, Zeng, Miao, Wang, You and Jiang, "Bootstrap latent representations for multi-modal
recommendation", WWW 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import mean_propagation, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.losses import half_squared_norm
from recommenders.models.base import Recommender, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.sampling import Batch

SEARCH = {"n_layers": (1, 2), "dropout": (0.3, 0.5), "l2": (0.1, 0.01)}
"""Sec. 4.1.4: layers and dropout; l2 as in the authors' toolkit, MMRec."""


class Bm3Config(BaseModel, frozen=True, extra="forbid"):
    """Settings of BM3; the length is the paper's for all models (sec. 4.1.4)."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(1, description="Times the embeddings are propagated over the graph.")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="Chance of an entry of the contrastive view to be dropped."
    )
    modality_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the losses on modalities: 1 in eq. 14, 2 in the released code."
    )
    l2: NonNegativeFloat = Field(
        0.1, description="Weight of the squared length of the propagated embeddings in a batch."
    )


class Bm3(Recommender):
    """Score: inner product of the predictor's outputs for h_u and h_i (eq. 15).

    h_u is the mean over layers of LightGCN's propagation, h_i the same plus the unpropagated embedding (eq. 4
    and 5), h_i^m = f_i^m W_m + b_m a projected modality (eq. 2), P one linear predictor for all (eq. 7). t(h)
    is h with entries dropped out, behind a stop-gradient (eq. 6 and 9). For a training pair, C the negative
    cosine (eq. 8), the loss is

        C(P h_u, t(h_i)) + C(P h_i, t(h_u))                         the graph, eq. 10
        + w sum over m of C(P h_i^m, t(h_i)) + C(P h_i^m, t(h_i^m))   alignment and masking, eq. 11 and 12

    in the mean over the batch, plus l2 / 2 times the mean of the squared lengths of h_u and h_i (eq. 14). The
    released code differs in three ways: it weighs the modalities' losses by 2 (``modality_weight``), it takes
    the unsquared length of the whole batch for l2, and it trains the feature tables themselves.

    Negatives are not used. Features decide how training goes, but no score is computed from them.
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: Bm3Config, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.n_layers, self.dropout, self.l2 = config.n_layers, config.dropout, config.l2
        self.modality_weight = config.modality_weight
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.predictor = Affine(rng, config.dim, config.dim)
        self.projections = nn.ModuleDict(
            {name: Affine(rng, width, config.dim) for name, width in features.dims.items()}
        )
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)

    @property
    @override
    def reads_negatives(self) -> bool:
        """None is read."""
        return False

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return what the predictor makes of h_u and h_i."""
        users, items = self._propagate()
        return self.predictor(users), self.predictor(items + self.embeddings[self.n_users :])

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return the three losses of eq. 10 to 12, touching only the batch's rows of the features."""
        users, items = self._propagate()
        h_user = rows_of(users, batch.users)
        h_item = rows_of(items, batch.positives) + rows_of(self.embeddings, self.n_users + batch.positives)
        target_user, target_item = self._contrastive(h_user), self._contrastive(h_item)
        total = -cosine_similarity(self.predictor(h_user), target_item).mean()
        total = total - cosine_similarity(self.predictor(h_item), target_user).mean()
        distinct, places = torch.unique(batch.positives, return_inverse=True)
        counts = torch.bincount(places) / len(places)  # a repeated item's modality losses are computed once
        target_sum = torch.zeros_like(distinct, dtype=h_item.dtype).unsqueeze(1).repeat(1, h_item.shape[1])
        target_sum.index_add_(0, places, nn.functional.normalize(target_item, dim=1))
        for name, projection in self.projections.items():
            h_modality = projection(rows_of(features.vectors[name], distinct))
            online = self.predictor(h_modality)
            # The cosines with several dropped-out views of one item add up to one product with their sum.
            alignment = (nn.functional.normalize(online, dim=1) * target_sum).sum() / len(places)
            masking = (cosine_similarity(online, self._contrastive(h_modality)) * counts).sum()
            total = total - self.modality_weight * (alignment + masking)
        return total + self.l2 / len(batch.users) * half_squared_norm(h_user, h_item)

    def _propagate(self) -> tuple[Tensor, Tensor]:
        propagated = mean_propagation(self.adjacency, self.embeddings, self.n_layers)
        return propagated[: self.n_users], propagated[self.n_users :]

    def _contrastive(self, embeddings: Tensor) -> Tensor:
        """Return the other view: entries dropped out while training, no gradient."""
        return dropout(embeddings.detach(), self.dropout, self.training)
