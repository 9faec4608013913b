"""DualGNN: a user's taste in each modality, weighed by the user, and shared with users who took the same.

Source: Wang, Wei, Yin, Wu, Song and Nie, "DualGNN: Dual graph neural network for multimedia recommendation",
IEEE Transactions on Multimedia, 2021.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from typing_extensions import override

from recommenders.co_occurrence import user_graph
from recommenders.feature_input import FeatureTable
from recommenders.graphs import mean_propagation, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.sampling import Batch

SEARCH = {"l2": (0.1, 0.01, 1e-3, 1e-4, 1e-5)}
"""Of the authors' and MMRec's configuration, which search the learning rate in 0.1 .. 1e-5 as well."""


class DualGnnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of DualGNN; defaults of the released code."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    hidden_dim: PositiveInt = Field(256, description="Width between the two layers that project features.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_neighbours: PositiveInt = Field(40, description="Users with most items in common that a user hears.")
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of a user's preferences and modality weights."
    )


class ModalityGcn(nn.Module):
    """Taste and content of one modality, propagated between users and items and summed over layers.

    Layer 0 of a user is a learnt preference, that of an item W2 leaky_relu(W1 f + b1) + b2, each of length 1.
    """

    def __init__(self, n_users: int, width: int, hidden_dim: int, dim: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.preference = xavier_uniform(rng, n_users, dim)
        self.inner = Affine(rng, width, hidden_dim)
        self.outer = Affine(rng, hidden_dim, dim)

    @override
    def forward(self, adjacency: Tensor, vectors: Tensor, n_layers: int) -> Tensor:
        """Return (U + I, D), users first."""
        content = self.outer(leaky_relu(self.inner(vectors)))
        nodes = torch.cat([normalize(self.preference, dim=1), normalize(content, dim=1)])
        return (n_layers + 1) * mean_propagation(adjacency, nodes, n_layers)


class DualGnn(Recommender):
    """h_i sums the item's embeddings over modalities, h_u is the user's weighted sum plus its neighbours'.

    Each modality has a graph network of its own (``ModalityGcn``). A user weighs its modalities by learnt
    weights, which start as a softmax of normal draws; to the weighted sum is added that of the n_neighbours
    users with most items in common, in proportions softmax(number of common items). The released code fills
    up lists that are shorter by drawing from them again each epoch; here they stay short.

    Loss of a batch: BPR plus l2 / 2 times the mean over rows of the squared lengths of the user's preferences
    and weights (the released code: BPR in base 2, and the mean over entries instead of their sum).
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: DualGnnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.n_layers, self.l2 = config.n_layers, config.l2
        self.parts = nn.ModuleDict(
            {
                name: ModalityGcn(self.n_users, width, config.hidden_dim, config.dim, rng)
                for name, width in features.dims.items()
            }
        )
        self.weights = modality_weights(self.n_users, len(features.modalities), rng)  # (U, M)
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)
        self._users_alike = user_graph(train, config.n_neighbours)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate each modality, then between users."""
        parts = [
            gcn(self.adjacency, features.vectors[name], self.n_layers) for name, gcn in self.parts.items()
        ]
        nodes = torch.stack(parts, dim=2)  # (U + I, D, M)
        users = (nodes[: self.n_users] * self.weights.unsqueeze(1)).sum(dim=2)
        items = nodes[self.n_users :].sum(dim=2)
        self._users_alike = self._users_alike.to(users.device)  # moved once, not in every step
        return users + self._users_alike.propagate(users), items

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2 of what is the users' own."""
        users, items = self(features)
        scores = pair_scores(rows_of(users, batch.users), rows_of(items, batch_items(batch)))
        own = [gcn.preference for gcn in self.parts.values() if isinstance(gcn, ModalityGcn)]
        penalty = half_squared_norm(*(rows_of(table, batch.users) for table in (*own, self.weights)))
        return bpr_loss(scores) + self.l2 / len(batch.users) * penalty


def modality_weights(n_users: int, n_modalities: int, rng: np.random.Generator) -> nn.Parameter:
    """Return (U, M) weights of each user's modalities, positive and adding up to 1 before training."""
    draws = np.exp(rng.standard_normal((n_users, n_modalities)))
    return nn.Parameter(torch.from_numpy((draws / draws.sum(axis=1, keepdims=True)).astype(np.float32)))
