"""SelfCF: a graph encoder that learns by predicting a perturbed view of itself, without any negative.

Source: Zhou, Sun, Liu, Zhang and Miao, "SelfCF: A simple framework for self-supervised collaborative
filtering", ACM Transactions on Recommender Systems, 2023.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.interactions import Interactions
from recommenders.losses import half_squared_norm
from recommenders.models.base import Recommender, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.sampling import Batch

SEARCH = {
    "n_layers": (1, 2),
    "dropout": (0.1, 0.2, 0.5),
    "l2": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "perturbation": ("embeddings", "edges"),
}
"""The configuration of the authors' toolkit, MMRec, and two of the paper's perturbations."""


class SelfCfConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of SelfCF on LightGCN; ranges of the authors' toolkit, MMRec."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(2, description="Times the embeddings are propagated over the graph.")
    perturbation: Literal["embeddings", "edges"] = Field(
        "embeddings", description="What is dropped in the view to predict: entries, or pairs of the graph."
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="Chance of an entry, or share of the pairs, to be dropped."
    )
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of the propagated embeddings in a batch."
    )


class SelfCf(Recommender):
    """Score: P e_u . e_i + e_u . P e_i, with e LightGCN's embeddings and P a linear predictor.

    Loss of a pair: C(P e_u, t(e_i)) / 2 + C(P e_i, t(e_u)) / 2, C the negative cosine and t the perturbed
    view behind a stop-gradient: e with entries dropped out, or what the encoder gives on a graph without some
    of the pairs, drawn for each batch. l2 / 2 times the mean over rows of the squared lengths of e_u and e_i
    is added. The paper's third perturbation, a mixture with the embeddings of an earlier batch, is left out.

    Negatives are not used.
    """

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: SelfCfConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.predictor = Affine(rng, config.dim, config.dim)
        self.graph = UserItemGraph(train)
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)

    @property
    @override
    def reads_negatives(self) -> bool:
        """None is read."""
        return False

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return [P e_u, e_u] and [e_i, P e_i], whose product is the score."""
        nodes = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        predicted = self.predictor(nodes)
        users = torch.cat([predicted[: self.n_users], nodes[: self.n_users]], dim=1)
        return users, torch.cat([nodes[self.n_users :], predicted[self.n_users :]], dim=1)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return how badly either end of a pair predicts the perturbed other, plus L2."""
        own = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        ends = batch.users, self.n_users + batch.positives
        user, item = (rows_of(own, nodes) for nodes in ends)
        user_view, item_view = self._views(own, *ends)
        by_user = cosine_similarity(self.predictor(user), item_view)
        by_item = cosine_similarity(self.predictor(item), user_view)
        penalty = self.config.l2 / len(batch.users) * half_squared_norm(user, item)
        return -(by_user.mean() + by_item.mean()) / 2 + penalty

    @torch.no_grad()
    def _views(self, own: Tensor, *ends: Tensor) -> list[Tensor]:
        """Return (B, D) perturbed views of the ends of the pairs; unperturbed unless training."""
        rate = self.config.dropout if self.training else 0.0
        if self.config.perturbation == "embeddings" or not rate:
            return [dropout(rows_of(own, nodes), rate) for nodes in ends]
        kept = self.graph.sample(max(1, round(len(self.graph) * (1 - rate))))
        pruned = mean_propagation(self.graph.adjacency(kept), self.embeddings, self.config.n_layers)
        return [rows_of(pruned, nodes) for nodes in ends]
