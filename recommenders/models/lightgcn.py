"""LightGCN: embeddings smoothed over the user-item graph, and nothing else.

Source: He, Deng, Wang, Li, Zhang and Wang, "LightGCN: Simplifying and powering graph convolution network for
recommendation", SIGIR 2020.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import mean_propagation, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.losses import LossConfig, half_squared_norm, loss_of_pairs, pair_scores, reads_negatives
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.ranges import Range
from recommenders.sampling import Batch

SEARCH: dict[str, Range] = {"l2": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), "n_layers": (1, 2, 3, 4)}
"""Sec. 4.1.2; the learning rate stays at 0.001 there."""


class LightGcnConfig(LossConfig, frozen=True, extra="forbid"):
    """Settings of LightGCN."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(3, description="Times the embeddings are propagated over the graph.")
    l2: NonNegativeFloat = Field(
        1e-4, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )


class LightGcn(Recommender):
    """Mean of the embeddings at layers 0 to L of the normalised user-item graph (eq. 4, 7, 8).

    Loss of a batch of B rows (u, i, j...): BPR on the propagated embeddings, plus l2 / 2 times the mean over
    rows of the squared lengths of the embeddings at layer 0 (eq. 15; by batch, as the authors train).
    Other losses take the place of BPR in it; those that read no negatives regularise none.
    """

    scores_pairs = True
    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: LightGcnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.ranking = config
        self.n_layers = config.n_layers
        self.l2 = config.l2
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate over the whole graph."""
        propagated = mean_propagation(self.adjacency, self.embeddings, self.n_layers)
        return propagated[: self.n_users], propagated[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR on propagated, or the loss chosen instead, plus L2 on unpropagated embeddings."""
        users, items = self(features)
        with_negatives = reads_negatives(self.ranking, batch.in_batch)
        item_rows = batch_items(batch) if with_negatives else batch.positives.unsqueeze(1)
        user_vectors, item_vectors = rows_of(users, batch.users), rows_of(items, item_rows)
        scores = pair_scores(user_vectors, item_vectors)
        ranked = loss_of_pairs(self.ranking, scores, user_vectors, item_vectors[:, 0], batch.in_batch)
        own = [rows_of(self.embeddings, rows) for rows in (batch.users, self.n_users + item_rows)]
        return ranked + self.l2 / len(batch.users) * half_squared_norm(*own)

    @override
    @torch.no_grad()
    def score_pairs(self, users: Tensor, items: Tensor, features: FeatureTable) -> Tensor:
        """Score items, (B, K) rows, for users, (B,) rows: one more propagation over the graph."""
        all_users, all_items = self(features)
        return pair_scores(rows_of(all_users, users), rows_of(all_items, items))
