"""LayerGCN: propagation whose every layer is refined by its likeness to the first, over a pruned graph.

Source: Zhou, Lin, Liu and Miao, "Layer-refined graph convolutional networks for recommendation", ICDE 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.propagation import symmetric_product
from recommenders.sampling import Batch

SEARCH = {"l2": (1e-2, 1e-3, 1e-4, 1e-5), "pruned_share": (0.0, 0.1, 0.2)}
"""What the authors search (sec. V-A4 and the settings of their toolkit, MMRec)."""

_EPSILON = 1e-8
"""Added to the likeness, so that a layer at a right angle to the first is not lost (eq. 9)."""


class LayerGcnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of LayerGCN; the number of layers and the length are the authors' for all data sets."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(4, description="Times the embeddings are propagated and refined.")
    pruned_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the pairs left out of the graph in each training epoch."
    )
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )


class LayerGcn(Recommender):
    """Sum over layers 1 .. L of x^(l) = (cos(A x^(l-1), x^(0)) + epsilon) A x^(l-1), without x^(0) itself.

    Training propagates over a graph drawn anew each epoch: a pair stays with a chance proportional to
    1 / sqrt(degree(u) degree(i)), so that pairs between the popular are pruned first, and what stays is
    normalised by its own degrees. Scores use the whole graph.

    Loss of a batch of B rows (u, i, j...): BPR on the sums, plus l2 / 2 times the mean over rows of the
    squared lengths of x^(0) (the paper's regularisation, by batch as the authors train).
    """

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: LayerGcnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.n_layers, self.l2 = config.n_layers, config.l2
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.graph = UserItemGraph(train)
        self.n_kept = round(len(self.graph) * (1 - config.pruned_share))
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)
        self._pruned: Tensor | None = None

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Draw the pairs that this epoch keeps."""
        if self.n_kept < len(self.graph):
            of_user, of_item = self.graph.degrees()
            chances = (of_user[self.graph.users] * of_item[self.graph.items]).float().rsqrt()
            self._pruned = self.graph.adjacency(self.graph.sample(self.n_kept, chances))

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate and refine over the epoch's graph while training, else over the whole one."""
        pruned = self._pruned if self.training else None
        adjacency = self.adjacency if pruned is None else pruned
        layer: Tensor = self.embeddings
        directions = normalize(self.embeddings, dim=1)
        layers: list[Tensor] = []
        for _ in range(self.n_layers):
            layer = symmetric_product(adjacency, layer)
            lengths = layer.square().sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
            likeness = (layer * directions).sum(dim=1, keepdim=True) / lengths
            layer = (likeness + _EPSILON) * layer
            layers.append(layer)
        total = torch.stack(layers).sum(dim=0)
        return total[: self.n_users], total[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR on the refined, plus L2 on unpropagated embeddings."""
        users, items = self(features)
        item_rows = batch_items(batch)
        scores = pair_scores(rows_of(users, batch.users), rows_of(items, item_rows))
        own = [rows_of(self.embeddings, rows) for rows in (batch.users, self.n_users + item_rows)]
        return bpr_loss(scores) + self.l2 / len(batch.users) * half_squared_norm(*own)
