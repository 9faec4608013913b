"""MMGCF: LightGCN's item embeddings fused with projected modalities, and nothing that could be left out.

Source: Spillo et al., "Multimodal graph collaborative filtering for recommendation with graph convolutional
networks", UMAP 2026, as its authors describe it in the code they gave to MMRec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.ranges import Range
from recommenders.sampling import Batch

SEARCH: dict[str, Range] = {
    "n_layers": (1, 2, 3),
    "l2": (0.1, 0.01, 1e-3, 1e-4),
    "fusion": ("mean", "sum", "concatenation"),
    "weighting": ("equal", "learned", "normalised"),
    "edge_dropout": (0.2, 0.5, 0.8),
}
"""The authors' configuration."""


class MmgcfConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of MMGCF; defaults are the first values the authors search, but for l2."""

    dim: PositiveInt = Field(64, description="Length of a user's, an item's and a modality's embedding.")
    n_layers: PositiveInt = Field(1, description="Times embeddings are propagated between users and items.")
    fusion: Literal["mean", "sum", "concatenation"] = Field(
        "mean", description="How embeddings become one; a concatenation is projected to `dim` numbers."
    )
    weighting: Literal["equal", "learned", "normalised"] = Field(
        "equal",
        description="equal: modalities are fused, and the result with the item; learned: item and modalities "
        "at once, weighed by a and 1 - a; normalised: at once, of length 1, the item as often as there are "
        "modalities.",
    )
    edge_dropout: float = Field(
        0.2, ge=0, lt=1, description="Share of user-item pairs left out of the graph in an epoch."
    )
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )


class Mmgcf(Recommender):
    """h_u is LightGCN's; an item's is F of LightGCN's h_i and the modalities m = W_m f_i.

    F is the mean, the sum, or V times the concatenation. Weighting "equal": F(h_i, F'(m, m', ...)), with a
    projection of its own for each F. "learned": F(a h_i, (1 - a) m, (1 - a) m', ...), a the logistic of one
    learned number that starts at 0. "normalised": F(M h_i / |h_i|, m / |m|, ...) for M modalities, where m =
    W_m f_i + b_m. Elsewhere, and in V, a bias would add the same to all scores of a user, and is left out;
    so a modality that an item lacks adds nothing.

    Each epoch trains on a part of the pairs, ``UserItemGraph.thinned``; scores use all.

    Loss of a batch: BPR, plus l2 / 2 times the mean over rows of the squared lengths of the unpropagated
    embeddings.
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: MmgcfConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        dim, n_modalities = config.dim, len(features.modalities)
        with_bias = config.weighting == "normalised"
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, dim)  # users first
        self.projections = nn.ModuleDict(
            {name: Affine(rng, width, dim, bias=with_bias) for name, width in features.dims.items()}
        )
        self.balance = nn.Parameter(torch.zeros(1)) if config.weighting == "learned" else None
        self.join_modalities: Affine | None = None
        self.join_all: Affine | None = None
        if config.fusion == "concatenation":
            in_two_steps = config.weighting == "equal"
            if in_two_steps and n_modalities > 1:
                self.join_modalities = Affine(rng, n_modalities * dim, dim, bias=False)
            n_parts = 2 if in_two_steps else 1 + n_modalities
            self.join_all = Affine(rng, n_parts * dim, dim, bias=False)
        self.graph = UserItemGraph(train)
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)
        self._thinned: Tensor | None = None

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Draw the pairs that stay in the user-item graph."""
        if self.config.edge_dropout:
            self._thinned = self.graph.thinned(self.config.edge_dropout)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate over all pairs, then fuse."""
        nodes = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        vectors = [features.vectors[name] for name in self.projections]
        return nodes[: self.n_users], self._fuse(nodes[self.n_users :], vectors)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR on embeddings from the thinned graph, plus L2; the batch's items alone are fused."""
        thinned = self.adjacency if self._thinned is None else self._thinned
        nodes = mean_propagation(thinned, self.embeddings, self.config.n_layers)
        item_rows = batch_items(batch)
        rows, places = torch.unique(item_rows, return_inverse=True)
        vectors = [rows_of(features.vectors[name], rows) for name in self.projections]
        fused = rows_of(self._fuse(rows_of(nodes, self.n_users + rows), vectors), places)
        loss = bpr_loss(pair_scores(rows_of(nodes, batch.users), fused))
        own = [rows_of(self.embeddings, wanted) for wanted in (batch.users, self.n_users + item_rows)]
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(*own)

    def _fuse(self, items: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Return (R, D) embeddings of R items from (R, D) propagated ones and (R, F_m) features."""
        parts: list[Tensor] = [
            project(table) for project, table in zip(self.projections.values(), vectors, strict=True)
        ]
        if self.balance is not None:
            share = torch.sigmoid(self.balance)
            return self._join([share * items, *((1 - share) * part for part in parts)], self.join_all)
        if self.config.weighting == "normalised":
            unit = [normalize(part, dim=1) for part in parts]
            return self._join([len(parts) * normalize(items, dim=1), *unit], self.join_all)
        content = self._join(parts, self.join_modalities) if len(parts) > 1 else parts[0]
        return self._join([items, content], self.join_all)

    def _join(self, parts: Sequence[Tensor], projection: Affine | None) -> Tensor:
        """Return F of (R, D) embeddings."""
        if projection is not None:
            joined: Tensor = projection(torch.cat(list(parts), dim=1))
            return joined
        stacked = torch.stack(list(parts))
        return stacked.mean(dim=0) if self.config.fusion == "mean" else stacked.sum(dim=0)
