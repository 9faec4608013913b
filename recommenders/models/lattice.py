"""LATTICE: item graphs that are learned from features, beside a collaborative filter.

Source: Zhang, Zhu, Liu, Wu, Wang and Wang, "Mining latent structures for multimedia recommendation", MM 2021.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import mean_propagation, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.item_graphs import (
    Edges,
    ItemGraph,
    SeenFeatures,
    are_live,
    cosine_weights,
    knn_edges,
    normalised,
)
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.neighbours import search_bytes
from recommenders.sampling import Batch

SEARCH = {
    "l2": (0.0, 1e-5, 1e-4, 1e-3),
    "training.learning_rate": (1e-4, 5e-4, 1e-3, 5e-3),
}
"""As in the authors' configuration and MMRec's."""


class LatticeConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of LATTICE; defaults and ranges as in the authors' configuration and MMRec's."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    feature_dim: PositiveInt = Field(64, description="Length that features are projected to, for the graph.")
    backbone: Literal["lightgcn", "mf"] = Field(
        "lightgcn", description="The collaborative filter: LightGCN, the paper's best, or factors alone."
    )
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times embeddings are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    initial_share: float = Field(
        0.9, ge=0, le=1, description="Share of the graph of the features as given, the paper's lambda."
    )
    graph_gradient: Literal["every_batch", "first_batch"] = Field(
        "every_batch",
        description="Batches of an epoch whose loss changes the learned graph; the authors' code: the first.",
    )
    l2: NonNegativeFloat = Field(
        1e-5,
        description="Weight of the squared length of the embeddings in a batch; tried: 0, 1e-5, 1e-4, 1e-3.",
    )
    block_rows: NonNegativeInt = Field(
        0, description="Items whose neighbours are searched at once; 0 chooses them for 128 MiB."
    )


class Lattice(Recommender):
    """x_i = the backbone's item embedding plus h_i / |h_i|, h from the latent item graph.

    A modality's graph is lambda S + (1 - lambda) A: S of the features as given, A of W_m f_i + b_m, both the
    k nearest items by cosine, negative cosines as 0, then D^-1/2 S D^-1/2 (eq. 1 to 3). The graphs are added
    with the weights softmax(a), a learned. An item without a modality has no edges there.

    What changes when: S is built from the table given to the constructor, and anew for another constant table
    or by ``refresh_graph``. Which items are A's neighbours is decided at the start of each epoch (and for
    each ranking) from the features and W_m as they are then; the weights of these edges follow in every
    batch, with gradient to W_m, b_m and live rows. Where live rows come in, S and the choice of neighbours
    stay as they are until the next epoch.

    Where the authors' code differs: it lets gradient through the graph in the first batch of an epoch only
    and takes the graph as constant in the others (``graph_gradient: first_batch``); it keeps negative
    cosines; and it trains a copy of the features. L2 is on the embeddings that are scored, as in their code.
    """

    needs_features = True
    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: LatticeConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.users = xavier_uniform(rng, self.n_users, config.dim)
        self.items = xavier_uniform(rng, self.n_items, config.dim)
        # Modality to (F_m, D'), W_m transposed, and to (D',), b_m.
        self.projections = nn.ParameterDict(
            {name: xavier_uniform(rng, width, config.feature_dim) for name, width in features.dims.items()}
        )
        self.biases = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(config.feature_dim)) for name in features.modalities}
        )
        self.modalities = features.modalities  # in the order of a; a ParameterDict orders its keys
        several = len(self.modalities) > 1
        self.importance = nn.Parameter(torch.zeros(len(self.modalities))) if several else None  # a
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)
        self._seen = SeenFeatures(features)
        self._given = self._graphs_as_given(features)
        self._learned = self._learned_edges(features)
        self._learned_by = self._copies()
        self._held: dict[str, ItemGraph] | None = None

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Choose the neighbours of the learned graph anew."""
        if not self._seen.are(features) and not are_live(features):
            self.refresh_graph(features)
        elif self._projections_moved() or are_live(features):
            self._learned = self._learned_edges(features)
            self._learned_by = self._copies()
        self._held = None

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build both graphs from what the rows and the projections are now."""
        self._seen = SeenFeatures(features)
        self._given = self._graphs_as_given(features)
        self._learned = self._learned_edges(features)
        self._learned_by = self._copies()
        self._held = None

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Embed with the graphs that these features and the projections make now."""
        if self.training and are_live(features):
            return self._embed(self._given, self._weigh(self._learned, features))
        if self._seen.are(features):
            given = self._given
            if self._projections_moved():
                self._learned, self._learned_by = self._learned_edges(features), self._copies()
            learned = self._learned
        else:
            given, learned = self._graphs_as_given(features), self._learned_edges(features)
        return self._embed(given, self._weigh(learned, features))

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2, on embeddings from the neighbours chosen for this epoch."""
        if not (self._seen.are(features) or are_live(features)):
            self.refresh_graph(features)
        users, items = self._embed(self._given, self._graphs_of_batch(features))
        taken, offered = rows_of(users, batch.users), rows_of(items, batch_items(batch))
        penalty = half_squared_norm(taken, offered)
        return bpr_loss(pair_scores(taken, offered)) + self.config.l2 / len(batch.users) * penalty

    @override
    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Estimate a step, or the choice of neighbours before an epoch where that takes more."""
        config = self.config
        search = search_bytes(self.n_items, config.feature_dim, config.block_rows)
        return max(super().working_bytes(n_pairs, n_negatives), search)

    def _embed(self, given: dict[str, ItemGraph], learned: dict[str, ItemGraph]) -> tuple[Tensor, Tensor]:
        """Return the embeddings that are scored."""
        users: Tensor = self.users
        items: Tensor = self.items
        latent: Tensor = self.items
        if self.config.backbone == "lightgcn":
            nodes = mean_propagation(self.adjacency, torch.cat([users, items]), self.config.n_layers)
            users, items = nodes[: self.n_users], nodes[self.n_users :]
        for _ in range(self.config.n_item_layers):
            latent = self._blended(given, learned, latent)
        return users, items + normalize(latent, dim=1)

    def _blended(self, given: dict[str, ItemGraph], learned: dict[str, ItemGraph], table: Tensor) -> Tensor:
        """Return the product of the sum of all graphs with a table (I, D)."""
        share = self.config.initial_share
        sums = []
        for name, graph in given.items():
            of_given = graph.to(table.device).propagate(table)
            sums.append(share * of_given + (1 - share) * learned[name].propagate(table))
        if self.importance is None:
            return sums[0]
        weights = torch.softmax(self.importance, dim=0)
        return torch.stack([weight * part for weight, part in zip(weights, sums, strict=True)]).sum(dim=0)

    def _graphs_of_batch(self, features: FeatureTable) -> dict[str, ItemGraph]:
        """Return the learned graphs, with gradient where the setting says so."""
        if self.config.graph_gradient == "every_batch":
            return self._weigh(self._learned, features)
        if self._held is None:
            graphs = self._weigh(self._learned, features)
            self._held = {name: ItemGraph(g.edges, g.weights.detach()) for name, g in graphs.items()}
            return graphs
        return self._held

    def _weigh(self, edges: dict[str, Edges], features: FeatureTable) -> dict[str, ItemGraph]:
        """Return the learned graphs on given edges; gradients reach projections and features."""
        graphs = {}
        for name, kept in edges.items():
            on_device = kept.to(self.items.device)
            weights = cosine_weights(on_device, self._project(name, features))
            graphs[name] = ItemGraph(on_device, normalised(on_device, weights))
        return graphs

    def _project(self, name: str, features: FeatureTable) -> Tensor:
        """Return W_m f_i + b_m of all items, (I, D')."""
        projection = self.projections[name]
        return torch.addmm(self.biases[name], features.vectors[name].to(projection.dtype), projection)

    @torch.no_grad()
    def _learned_edges(self, features: FeatureTable) -> dict[str, Edges]:
        """Find the nearest items by the projected features."""
        return {
            name: knn_edges(
                self._project(name, features), features.present[name], self.config.k, self.config.block_rows
            )
            for name in self.modalities
        }

    @torch.no_grad()
    def _graphs_as_given(self, features: FeatureTable) -> dict[str, ItemGraph]:
        """Return the graph S of each modality."""
        graphs = {}
        for name in self.modalities:
            vectors = features.vectors[name]
            edges = knn_edges(vectors, features.present[name], self.config.k, self.config.block_rows)
            graphs[name] = ItemGraph(edges, normalised(edges, cosine_weights(edges, vectors)))
        return graphs

    def _copies(self) -> list[Tensor]:
        """Return copies of the projections; a fused optimiser's step leaves no other trace of a change."""
        return [part.detach().clone() for part in (*self.projections.values(), *self.biases.values())]

    def _projections_moved(self) -> bool:
        """Tell whether the learned graph's neighbours were chosen by other projections than today's."""
        parts = (*self.projections.values(), *self.biases.values())
        return not all(
            then.device == now.device and torch.equal(then, now)
            for then, now in zip(self._learned_by, parts, strict=True)
        )
