"""LGMRec: local embeddings of behaviour and of each modality, and global ones through learnt hyperedges.

Source: Guo, Li, Li, Wang, Shi and Ruan, "LGMRec: Local and global graph learning for multimodal
recommendation", AAAI 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.info_nce import info_nce
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.propagation import UserItemMatrix, symmetric_product
from recommenders.sampling import Batch

SEARCH = {
    "n_hyperedges": (4, 8, 16, 32, 64, 128, 256),
    "n_hyper_layers": (1, 2),
    "alpha": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "dropout": (0.5, 0.6, 0.8),
    "contrast_weight": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "l2": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
"""Around the released configurations of Baby (the defaults), Sports (alpha 0.6, dropout 0.6) and Clothing
(64 hyperedges, 2 layers, alpha 0.2, dropout 0.8)."""


class LgmRecConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of LGMRec; defaults of the released configuration for Amazon Baby."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_modality_layers: PositiveInt = Field(2, description="Times projected modalities are propagated there.")
    n_hyperedges: PositiveInt = Field(4, description="Learnt hyperedges, attributes, of each modality.")
    n_hyper_layers: PositiveInt = Field(1, description="Times embeddings pass through the hyperedges.")
    alpha: NonNegativeFloat = Field(0.3, description="Weight of the global embeddings.")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="Chance of a share of a hyperedge to be dropped in training."
    )
    temperature: PositiveFloat = Field(0.2, description="Of the shares of hyperedges and of the contrast.")
    contrast_weight: NonNegativeFloat = Field(
        1e-4, description="Weight of the contrast between modalities' hypergraphs, summed over a batch."
    )
    contrast_with: Literal["all", "batch"] = Field(
        "all",
        description="What a user is told from: all users, as in the paper, a batch x U block of numbers; or "
        "the batch's. Items likewise.",
    )
    l2: NonNegativeFloat = Field(
        1e-6, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )


@dataclass(frozen=True, eq=False)
class _Hypergraph:
    """One modality's hyperedges at the last layer: global embeddings are shares times edges."""

    user_shares: Tensor  # (U, A)
    item_shares: Tensor  # (I, A)
    edges: Tensor  # (A, D)


class LgmRec(Recommender):
    """Local embeddings, plus alpha times the length-1 global ones.

    Local: the mean over layers of LightGCN's propagation, plus for each modality the length-1 embedding that
    W_m f_i, beside the mean over each user's items, becomes after n_modality_layers propagations.

    Global: item i depends on the hyperedges of modality m by f_i V_m, user u by the sum of that over its
    items. A Gumbel softmax turns dependencies into shares H_i^m and H_u^m. LightGCN's items E pass through
    the hyperedges, E <- H_i (H_i' E), and the users at the last layer get H_u (H_i' E). Modalities add up.

    Loss of a batch: BPR; contrast_weight times the sum over its distinct users and positive items, and over
    pairs of modalities, of the InfoNCE that tells the global embedding by one modality from all users'
    (items') by the other, on cosines; l2 / 2 times the mean over rows of the squared lengths of the
    unpropagated embeddings (the released code: unsquared lengths of the final ones). Gumbel noise and dropout
    are for training; the released code adds the noise when it scores, too. As global embeddings are of rank
    A, their cosines are computed in A numbers instead of D.
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: LgmRecConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.modalities = features.modalities  # a ParameterDict has an order of its own
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        # Modality to (F_m, D), W_m transposed, and to (F_m, A), the hyperedges V_m.
        self.projections = nn.ParameterDict(
            {name: xavier_uniform(rng, width, config.dim) for name, width in features.dims.items()}
        )
        self.hyperedges = nn.ParameterDict(
            {name: xavier_uniform(rng, width, config.n_hyperedges) for name, width in features.dims.items()}
        )
        graph = UserItemGraph(train)
        self.register_buffer("adjacency", graph.adjacency(), persistent=False)
        self.user_means = UserItemMatrix.mean(graph)
        self.user_sums = UserItemMatrix(graph, torch.ones(len(graph)))

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return local plus global embeddings of all, without noise and dropout."""
        local, modal = self._local(features)
        final = self._combine(local, modal, self._hypergraphs(local, features, noisy=False))
        return final[: self.n_users], final[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR, contrast and L2; what is done row by row is done for the batch's rows alone."""
        local, modal = self._local(features)
        graphs = self._hypergraphs(local, features, noisy=self.training)
        item_rows = batch_items(batch)
        user_rows, user_places = torch.unique(batch.users, return_inverse=True)
        rows, places = torch.unique(item_rows, return_inverse=True)
        final = self._combine(local, modal, graphs, torch.cat([user_rows, self.n_users + rows]))
        users, items = final[: len(user_rows)], final[len(user_rows) :]
        loss = bpr_loss(pair_scores(rows_of(users, user_places), rows_of(items, places)))
        if self.config.contrast_weight:
            for one, other in combinations(graphs, 2):
                by_user = self._contrast(
                    (one.user_shares, one.edges), (other.user_shares, other.edges), user_rows
                )
                by_item = self._contrast(
                    (one.item_shares, one.edges),
                    (other.item_shares, other.edges),
                    torch.unique(batch.positives),
                )
                loss = loss + self.config.contrast_weight * (by_user + by_item)
        own = rows_of(self.embeddings, torch.cat([batch.users, self.n_users + item_rows.flatten()]))
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(own)

    def _local(self, features: FeatureTable) -> tuple[Tensor, list[Tensor]]:
        """Return LightGCN's (U + I, D) embeddings, and those by modality before they get length 1."""
        local = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        modal = []
        for name in self.modalities:
            projection = self.projections[name]
            items = features.vectors[name].to(projection.dtype) @ projection
            nodes = torch.cat([self.user_means.to_users(items), items])
            for _ in range(self.config.n_modality_layers):
                nodes = symmetric_product(self.adjacency, nodes)
            modal.append(nodes)
        return local, modal

    def _hypergraphs(self, local: Tensor, features: FeatureTable, *, noisy: bool) -> list[_Hypergraph]:
        """Return each modality's shares, and its hyperedges at the last layer."""
        graphs = []
        for name in self.modalities:
            hyperedges = self.hyperedges[name]
            of_items = features.vectors[name].to(hyperedges.dtype) @ hyperedges
            of_users = self.user_sums.to_users(of_items)
            item_shares, user_shares = self._shares(of_items, noisy), self._shares(of_users, noisy)
            edges = item_shares.T @ local[self.n_users :]
            for _ in range(self.config.n_hyper_layers - 1):
                edges = item_shares.T @ (item_shares @ edges)
            graphs.append(_Hypergraph(user_shares, item_shares, edges))
        return graphs

    def _shares(self, dependencies: Tensor, noisy: bool) -> Tensor:
        """Return the (R, A) softmax of dependencies, with Gumbel noise and dropout where asked for."""
        if not noisy:
            return torch.softmax(dependencies / self.config.temperature, dim=1)
        # -ln of an Exp(1) draw is a Gumbel one; ln d - ln (1 - d) of the paper is the binary case.
        gumbel = -torch.empty_like(dependencies).exponential_().clamp_min(1e-20).log()
        shares = torch.softmax((dependencies + gumbel) / self.config.temperature, dim=1)
        return dropout(shares, self.config.dropout)

    def _combine(
        self, local: Tensor, modal: list[Tensor], graphs: list[_Hypergraph], nodes: Tensor | None = None
    ) -> Tensor:
        """Return (R, D) final embeddings of R users and items, or of all."""
        whole = torch.zeros_like(local[:1])
        for graph in graphs:
            shares = torch.cat([graph.user_shares, graph.item_shares])
            whole = whole + (shares if nodes is None else rows_of(shares, nodes)) @ graph.edges
        parts = [table if nodes is None else rows_of(table, nodes) for table in (local, *modal)]
        lengths_1 = torch.stack([normalize(part, dim=1) for part in parts[1:]]).sum(dim=0)
        return parts[0] + lengths_1 + self.config.alpha * normalize(whole, dim=1)

    def _contrast(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """Return the sum over rows of the InfoNCE of shares times edges by one and by another modality."""
        anchors = _over_length(rows_of(one[0], rows), one[1]) @ (one[1] @ other[1].T)
        others = _over_length(rows_of(other[0], rows), other[1])
        if self.config.contrast_with == "all":
            rest = torch.ones(len(other[0]), dtype=torch.bool, device=rows.device)
            rest[rows] = False
            others = torch.cat([others, _over_length(other[0][rest], other[1])])
        return len(rows) * info_nce(anchors, others, self.config.temperature)


def _over_length(shares: Tensor, edges: Tensor) -> Tensor:
    """Return (R, A) shares divided by the lengths of the rows of ``shares @ edges``."""
    squares = ((shares @ (edges @ edges.T)) * shares).sum(dim=1, keepdim=True)
    return shares * squares.clamp_min(1e-24).rsqrt()  # 1e-12 for lengths, as torch's normalize has it
