"""MGCN: modalities purified by behaviour, smoothed between like items, and fused by what a user prefers.

Source: Yu, Tan, Lu and Bao, "Multi-view graph convolutional network for multimedia recommendation", MM 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.interactions import Interactions
from recommenders.item_graphs import ItemGraph, cosine_graph
from recommenders.models.base import Recommender, xavier_uniform
from recommenders.models.layers import Affine, chained
from recommenders.models.side_loss import Propagated, side_loss
from recommenders.propagation import KeptFor, UserItemMatrix
from recommenders.sampling import Batch

SEARCH = {"contrast_weight": (1e-3, 1e-2, 1e-1)}
"""Sec. 4.1.4 and the released configuration, which leaves all else at the defaults below."""


class MgcnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of MGCN; defaults of sec. 4.1.4 and the released configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times modalities are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    temperature: PositiveFloat = Field(0.2, description="Temperature of the contrast between the two views.")
    contrast_weight: NonNegativeFloat = Field(0.01, description="Weight of that contrast.")
    l2: NonNegativeFloat = Field(
        1e-4, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )
    fuser: Literal["paper", "released"] = Field(
        "paper",
        description="Sum of what modalities share and the mean of what is their own; or, as in the released "
        "code, the mean of what they share and of each modality's own.",
    )


class Mgcn(Recommender):
    """Sum of a behavioural embedding (LightGCN's) and a multimodal one.

    Purifier: x_i^m = e_i * sigmoid(W2_m (W1_m f_i + b1_m) + b2_m), with e_i the embedding. Smoothed over the
    modality's graph of the k nearest items by cosine, D^-1/2 S D^-1/2, it is h_i^m; a user's h_u^m is the sum
    of h_i^m / sqrt(degree(u) degree(i)) over its items. Fuser, for users and items alike: the shared part s
    is the attention-weighted sum of the h^m, with weights softmax over m of q . tanh(W3 h^m + b3); each
    modality's own part is h^m - s, let through by sigmoid(W4_m e' + b4_m) of the behavioural embedding e';
    multimodal is s plus the mean of the own parts. The released code divides the sum of all these by M + 1
    (``fuser``).

    Loss of a batch: BPR; contrast_weight times the InfoNCE, on cosines, of multimodal and behavioural
    embeddings of users and of positive items, each once; l2 / 2 times the mean over rows of the squared
    lengths of the unpropagated embeddings. (The paper contrasts all users and items; as the released code
    does, a batch is contrasted with itself. That code counts repeated rows, and puts l2 on the final
    embeddings.)
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: MgcnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        dim = config.dim
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, dim)  # users first
        self.projections = nn.ModuleDict({m: Affine(rng, width, dim) for m, width in features.dims.items()})
        self.gates = nn.ModuleDict({m: Affine(rng, dim, dim) for m in features.modalities})
        self.attention = nn.Sequential(Affine(rng, dim, dim), nn.Tanh(), Affine(rng, dim, 1, bias=False))
        self.preferences = nn.ModuleDict({m: Affine(rng, dim, dim) for m in features.modalities})
        graph = UserItemGraph(train)
        self.register_buffer("adjacency", graph.adjacency(), persistent=False)
        self.user_items = UserItemMatrix.symmetric(graph)
        self._item_graphs = KeptFor(self._build, features)

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the item graphs from what the rows are now."""
        self._item_graphs.refresh(features)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return the sum of both embeddings for all."""
        behaviour, user_parts, item_parts = self._propagate(features)
        users, items = behaviour[: self.n_users], behaviour[self.n_users :]
        return users + self._fuse(users, user_parts), items + self._fuse(items, item_parts)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR, contrast and L2; what is done row by row is done for the batch's rows alone."""
        return side_loss(batch, self.embeddings, self._propagate(features), self._fuse, self.config)

    @override
    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Add what the fuser makes of each modality: some four tables of the batch's rows, with gradients."""
        rows = n_pairs * (2 + n_negatives)
        fused = 4 * 4 * rows * self.config.dim * len(self.projections)
        return super().working_bytes(n_pairs, n_negatives) + fused

    def _propagate(self, features: FeatureTable) -> Propagated:
        """Return (U + I, D) behavioural embeddings, and h^m by modality, (U, D) and (I, D)."""
        behaviour = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        graphs = self._item_graphs.of(features, training=self.training)
        items = self.embeddings[self.n_users :]
        item_parts = []
        for name, project in self.projections.items():
            gate = torch.sigmoid(chained(project, self.gates[name])(features.vectors[name]))
            graph = graphs[name].to(gate.device)
            item_parts.append(graph.propagate(items * gate, self.config.n_item_layers))
        return behaviour, [self.user_items.to_users(part) for part in item_parts], item_parts

    def _fuse(self, behaviour: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Return (R, D) multimodal embeddings of R users or items from their h^m."""
        attention = torch.softmax(torch.cat([self.attention(part) for part in parts], dim=1), dim=1)
        shared = (attention.unsqueeze(2) * torch.stack(list(parts), dim=1)).sum(dim=1)
        own = [
            torch.sigmoid(prefer(behaviour)) * (part - shared)
            for prefer, part in zip(self.preferences.values(), parts, strict=True)
        ]
        if self.config.fuser == "released":
            return torch.stack([shared, *own]).mean(dim=0)
        return shared + torch.stack(own).mean(dim=0)

    def _build(self, features: FeatureTable) -> dict[str, ItemGraph]:
        return {
            name: cosine_graph(vectors, features.present[name], self.config.k)
            for name, vectors in features.vectors.items()
        }
