"""FREEDOM: a frozen graph between items, and a user-item graph that is thinned while training.

Source: Zhou and Shen, "A tale of two graphs: Freezing and denoising graph structures for multimodal
recommendation", MM 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.interactions import Interactions
from recommenders.item_graphs import (
    ItemGraph,
    SeenFeatures,
    are_live,
    blended_even_graph,
)
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.sampling import Batch

SEARCH = {"edge_dropout": (0.8, 0.9), "feature_weight": (0.0, 1e-5, 1e-4, 1e-3)}
"""As in the authors' configuration."""


class FreedomConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of FREEDOM; defaults and ranges as in the authors' configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times embeddings are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    image_share: float = Field(
        0.1, ge=0, le=1, description="The image graph's share in the item graph; the others share the rest."
    )
    edge_dropout: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Share of user-item pairs left out of the graph in an epoch; tried: 0.8, 0.9.",
    )
    feature_weight: NonNegativeFloat = Field(
        1e-3, description="Weight of ranking by features alone; tried: 0, 1e-5, 1e-4, 1e-3."
    )
    l2: NonNegativeFloat = Field(
        0.0, description="Weight of the squared length of the unpropagated embeddings; the authors have none."
    )
    block_rows: NonNegativeInt = Field(
        0, description="Items whose neighbours are searched at once; 0 chooses them for 128 MiB."
    )


class Freedom(Recommender):
    """h_u from the user-item graph; h_i from it, plus the item's embedding smoothed over the item graph.

    Item graph ("Constructing frozen item-item graph"): per modality the k nearest items by cosine, each edge
    1, D^-1/2 S D^-1/2 with the sums of rows in D, blended by shares. It is frozen: built from the table given
    to the constructor, and anew only for another constant table or by ``refresh_graph``. Live rows leave it
    as it is, and get their gradient from the second part of the loss.

    User-item graph ("Denoising user-item bipartite graph"): each epoch keeps a part of the pairs, drawn
    without replacement with chances proportional to 1 / sqrt(degree(u) degree(i)), and normalises what is
    left. Scores use all pairs.

    Loss of a batch: BPR, plus feature_weight times the sum over modalities of BPR on h_u . W_m f_i.
    The bias of W_m f_i + b_m is left out, as BPR cancels it. The authors' code also trains a copy of the
    features; here features are an argument, and trained where joint training makes them live.
    """

    needs_features = True

    def __init__(
        self, train: Interactions, features: FeatureTable, config: FreedomConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.users = xavier_uniform(rng, self.n_users, config.dim)
        self.items = xavier_uniform(rng, self.n_items, config.dim)
        # Modality to (F_m, D), W_m transposed.
        self.projections = nn.ParameterDict(
            {name: xavier_uniform(rng, width, config.dim) for name, width in features.dims.items()}
        )
        self.graph = UserItemGraph(train)
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)
        self._thinned: Tensor | None = None
        self._kept = (SeenFeatures(features), self._build(features))

    adjacency: Tensor

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Draw the pairs that stay in the user-item graph."""
        if self.config.edge_dropout:
            self._thinned = self.graph.thinned(self.config.edge_dropout)

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the item graph from what the rows are now."""
        self._kept = (SeenFeatures(features), self._build(features))

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate over all pairs and over the item graph."""
        return self._embed(self.adjacency, features)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR on embeddings from the thinned graph, BPR on projected features, and L2."""
        thinned = self.adjacency if self._thinned is None else self._thinned
        users, items = self._embed(thinned, features)
        item_rows = batch_items(batch)
        taken = rows_of(users, batch.users)  # (B, D)
        loss = bpr_loss(pair_scores(taken, rows_of(items, item_rows)))
        if self.config.feature_weight:
            for name, projection in self.projections.items():
                vectors = rows_of(features.vectors[name], item_rows).to(projection.dtype)  # (B, 1 + N, F)
                # h_u . W f = (W' h_u) . f: one product a user instead of one an item.
                ranked = bpr_loss(pair_scores(taken @ projection.T, vectors))
                loss = loss + self.config.feature_weight * ranked
        if self.config.l2:
            own = half_squared_norm(rows_of(self.users, batch.users), rows_of(self.items, item_rows))
            loss = loss + self.config.l2 / len(batch.users) * own
        return loss

    def _embed(self, adjacency: Tensor, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return h_u and h_i."""
        nodes = mean_propagation(adjacency, torch.cat([self.users, self.items]), self.config.n_layers)
        alike = self._item_graph(features).propagate(self.items, self.config.n_item_layers)
        return nodes[: self.n_users], nodes[self.n_users :] + alike

    def _item_graph(self, features: FeatureTable) -> ItemGraph:
        """Return the graph of these features; while they are live, the one kept."""
        seen, graph = self._kept
        if seen.are(features) or (self.training and are_live(features)):
            return graph.to(self.items.device)
        if not self.training:  # a measurement leaves no trace in the training
            return self._build(features)
        self.refresh_graph(features)
        return self._kept[1]

    def _build(self, features: FeatureTable) -> ItemGraph:
        return blended_even_graph(features, self.config.k, self.config.image_share, self.config.block_rows)
