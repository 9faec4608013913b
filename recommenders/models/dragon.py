"""DRAGON: modalities side by side, smoothed between like items, and between users who took the same.

Source: Zhou, Zhou, Zhang and Shen, "Enhancing dyadic relations with homogeneous graphs for multimodal
recommendation", ECAI 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from recommenders.co_occurrence import user_graph
from recommenders.feature_input import FeatureTable
from recommenders.graphs import user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.item_graphs import ItemGraph, blended_even_graph
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of
from recommenders.models.dualgnn import ModalityGcn, modality_weights
from recommenders.propagation import KeptFor
from recommenders.sampling import Batch

SEARCH = {"l2": (0.1, 0.01, 1e-3, 1e-4, 1e-5)}
"""Of the released configuration, which searches the learning rate in 0.1 .. 1e-5 as well."""


class DragonConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of DRAGON; defaults of the released configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding in one modality.")
    hidden_dim: PositiveInt = Field(256, description="Width between the two layers that project features.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times embeddings are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    image_share: float = Field(
        0.1, ge=0, le=1, description="The image graph's share in the item graph; the others share the rest."
    )
    n_neighbours: PositiveInt = Field(40, description="Users with most items in common that a user hears.")
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of a user's preferences and modality weights."
    )


class Dragon(Recommender):
    """Embeddings of all modalities one beside the other, M D numbers, each plus that of its like.

    Each modality has DualGNN's graph network (``ModalityGcn``). A user's modalities are scaled by learnt
    weights before they are put side by side, an item's are not. Items add the propagation of that over the
    frozen item graph of FREEDOM: per modality the k nearest by cosine, each edge 1, D^-1/2 S D^-1/2, blended
    by shares. Users add that of the n_neighbours users with most items in common, in proportions
    softmax(number of common items). The released code fills up lists that are shorter by drawing from them
    again each epoch; here they stay short.

    Loss of a batch: BPR plus l2 / 2 times the mean over rows of the squared lengths of the user's preferences
    and weights (the released code: BPR in base 2, and the mean over entries instead of their sum).
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: DragonConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.parts = nn.ModuleDict(
            {
                name: ModalityGcn(self.n_users, width, config.hidden_dim, config.dim, rng)
                for name, width in features.dims.items()
            }
        )
        self.weights = modality_weights(self.n_users, len(features.modalities), rng)  # (U, M)
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)
        self._users_alike = user_graph(train, config.n_neighbours)
        self._item_graph = KeptFor(self._build, features)

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the item graph from what the rows are now."""
        self._item_graph.refresh(features)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate each modality, then between users and between items."""
        parts = [
            gcn(self.adjacency, features.vectors[name], self.config.n_layers)
            for name, gcn in self.parts.items()
        ]
        scales = self.weights.unsqueeze(2).unbind(dim=1)  # M of (U, 1)
        users = torch.cat(
            [part[: self.n_users] * scale for part, scale in zip(parts, scales, strict=True)], dim=1
        )
        items = torch.cat([part[self.n_users :] for part in parts], dim=1)
        alike = self._item_graph.of(features, training=self.training).to(items.device)
        self._users_alike = self._users_alike.to(users.device)  # moved once, not in every step
        users = users + self._users_alike.propagate(users)
        return users, items + alike.propagate(items, self.config.n_item_layers)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2 of what is the users' own."""
        users, items = self(features)
        scores = pair_scores(rows_of(users, batch.users), rows_of(items, batch_items(batch)))
        own = [gcn.preference for gcn in self.parts.values() if isinstance(gcn, ModalityGcn)]
        penalty = half_squared_norm(*(rows_of(table, batch.users) for table in (*own, self.weights)))
        return bpr_loss(scores) + self.config.l2 / len(batch.users) * penalty

    def _build(self, features: FeatureTable) -> ItemGraph:
        return blended_even_graph(features, self.config.k, self.config.image_share)
