"""PGL: trained on the principal part of the user-item graph, scored on all of it.

Source: Yu, Tan, Lu and Bao, "Mind individual information! Principal graph learning for multimedia
recommendation", AAAI 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph
from recommenders.info_nce import info_nce
from recommenders.interactions import Interactions
from recommenders.item_graphs import ItemGraph, blended_even_graph
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.propagation import KeptFor, symmetric_product
from recommenders.sampling import Batch

SEARCH = {
    "subgraph": ("local", "global"),
    "kept_share": (0.1, 0.3, 0.5),
    "contrast_weight": (0.0, 1e-3, 1e-2),
}
"""Around the released configuration, which compares the two subgraphs and keeps 0.3 of the pairs."""

Propagate = Callable[[Tensor], Tensor]


class PglConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of PGL; defaults of the released configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding in one modality.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times embeddings are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    image_share: float = Field(
        0.1, ge=0, le=1, description="The image graph's share in the item graph; the others share the rest."
    )
    subgraph: Literal["local", "global"] = Field(
        "local", description="What training propagates over: pairs drawn each epoch, or a low-rank graph."
    )
    kept_share: float = Field(0.3, gt=0, le=1, description="local: share of the pairs drawn in an epoch.")
    n_components: PositiveInt = Field(16, description="global: singular values kept of the normalised graph.")
    contrast_weight: NonNegativeFloat = Field(
        0.0, description="Weight of the contrast between two dropped-out views of final embeddings."
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="Chance of an entry of such a view to be dropped.")
    temperature: PositiveFloat = Field(0.2, description="Temperature of that contrast.")
    l2: NonNegativeFloat = Field(
        0.0, description="Weight of the squared length of users' embeddings in a batch; the paper has none."
    )


class Pgl(Recommender):
    """Modalities side by side, M D numbers: mean over layers of the propagation, items plus those like them.

    Layer 0 of a user is learnt, that of an item the length-1 projections W_m f + b_m. Items add the
    propagation of their layer 0 over FREEDOM's frozen item graph: per modality the k nearest by cosine, each
    edge 1, D^-1/2 S D^-1/2, blended by shares.

    Training propagates over a principal subgraph. local: each epoch draws kept_share of the pairs, with
    chances proportional to 1 / sqrt(degree(u) degree(i)), normalised by their own degrees. global: the
    n_components largest singular values and vectors of the normalised user-item matrix, multiplied as three
    thin matrices, never as one of U x I. (The released code multiplies the largest by the smallest singular
    values, a quarter of 64 each, and drops entries under 1e-3.) Scores use the whole graph.

    Loss of a batch: BPR, plus contrast_weight times the mean, over users and positive items, each once, of
    the InfoNCE on cosines of two views with entries dropped out; the released configuration has weight 0.
    """

    needs_features = True

    adjacency: Tensor
    user_vectors: Tensor
    item_vectors: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: PglConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.users = xavier_uniform(rng, self.n_users, config.dim * len(features.modalities))
        self.projections = nn.ModuleDict(
            {name: Affine(rng, width, config.dim) for name, width in features.dims.items()}
        )
        self.graph = UserItemGraph(train)
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)
        self._drawn: Tensor | None = None
        if config.subgraph == "global":
            for name, vectors in zip(
                ("user_vectors", "item_vectors"), _principal(train, config.n_components), strict=True
            ):
                self.register_buffer(name, vectors, persistent=False)
        self._item_graph = KeptFor(self._build, features)

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Draw the pairs that this epoch propagates over."""
        if self.config.subgraph == "local":
            of_user, of_item = self.graph.degrees()
            chances = (of_user[self.graph.users] * of_item[self.graph.items]).float().rsqrt()
            n_kept = max(1, round(len(self.graph) * self.config.kept_share))
            self._drawn = self.graph.adjacency(self.graph.sample(n_kept, chances))

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the item graph from what the rows are now."""
        self._item_graph.refresh(features)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate over the whole graph."""
        return self._embed(lambda nodes: symmetric_product(self.adjacency, nodes), features)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR on embeddings from the subgraph, contrast and L2."""
        users, items = self._embed(self._propagate_principal, features)
        item_rows = batch_items(batch)
        loss = bpr_loss(pair_scores(rows_of(users, batch.users), rows_of(items, item_rows)))
        if self.config.contrast_weight:
            views = [
                self._contrast(rows_of(users, torch.unique(batch.users))),
                self._contrast(rows_of(items, torch.unique(batch.positives))),
            ]
            loss = loss + self.config.contrast_weight * torch.stack(views).mean()
        if self.config.l2:
            own = half_squared_norm(rows_of(self.users, batch.users))
            loss = loss + self.config.l2 / len(batch.users) * own
        return loss

    def _embed(self, propagate: Propagate, features: FeatureTable) -> tuple[Tensor, Tensor]:
        content = torch.cat(
            [normalize(project(features.vectors[name]), dim=1) for name, project in self.projections.items()],
            dim=1,
        )
        layer = total = torch.cat([self.users, content])
        for _ in range(self.config.n_layers):
            layer = propagate(layer)
            total = total + layer
        mean = total / (self.config.n_layers + 1)
        alike = self._item_graph.of(features, training=self.training).to(content.device)
        like = alike.propagate(content, self.config.n_item_layers)
        return mean[: self.n_users], mean[self.n_users :] + like

    def _propagate_principal(self, nodes: Tensor) -> Tensor:
        """Return (U + I, D) nodes propagated over the subgraph."""
        if self.config.subgraph == "local":
            return symmetric_product(self.adjacency if self._drawn is None else self._drawn, nodes)
        users, items = nodes[: self.n_users], nodes[self.n_users :]
        return torch.cat(
            [
                self.user_vectors @ (self.item_vectors.T @ items),
                self.item_vectors @ (self.user_vectors.T @ users),
            ]
        )

    def _contrast(self, rows: Tensor) -> Tensor:
        one, other = (normalize(dropout(rows, self.config.dropout, self.training), dim=1) for _ in range(2))
        return info_nce(one, other, self.config.temperature)

    def _build(self, features: FeatureTable) -> ItemGraph:
        return blended_even_graph(features, self.config.k, self.config.image_share)


def _principal(train: Interactions, n_components: int) -> tuple[Tensor, Tensor]:
    """Return (U, q) and (I, q), whose product is the best approximation of rank q of the normalised matrix.

    Each holds singular vectors times the roots of the singular values; q is below the smaller side.
    """
    matrix = train.csr().astype(np.float64)
    by_user, by_item = (
        sparse.diags_array(1 / np.sqrt(np.maximum(counts, 1)))
        for counts in (np.diff(matrix.indptr), np.bincount(matrix.indices, minlength=train.n_items))
    )
    matrix = by_user @ matrix @ by_item
    n_components = min(n_components, min(matrix.shape) - 1)
    left, values, right = svds(matrix, k=n_components, v0=np.ones(min(matrix.shape)))
    roots = np.sqrt(values)
    return torch.from_numpy((left * roots).astype(np.float32)), torch.from_numpy(
        (right.T * roots).astype(np.float32)
    )
