"""GRCN: the content of a user's items tells which interactions to believe, before ids are propagated.

Source: Wei, Wang, Nie, He and Chua, "Graph-refined convolutional network for multimedia recommendation with
implicit feedback", MM 2020.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph
from recommenders.interactions import Interactions
from recommenders.item_graphs import Edges, edge_products, neighbour_sums
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.sampling import Batch

SEARCH = {"l2": (0.1, 0.01, 1e-3, 1e-4, 1e-5)}
"""Of MMRec's configuration, which searches the learning rate in 1 .. 1e-4 as well."""


class GrcnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of GRCN; defaults of sec. 4.1.4 and MMRec's configuration."""

    dim: PositiveInt = Field(64, description="Length of the embedding of an id.")
    content_dim: PositiveInt = Field(64, description="Length of the embedding of one modality.")
    n_routings: PositiveInt = Field(3, description="Times a user's prototype moves towards its items.")
    n_layers: PositiveInt = Field(2, description="Times ids are propagated over the refined graph.")
    l2: NonNegativeFloat = Field(
        1e-3, description="Weight of the squared length of ids and preferences in a batch."
    )


class Grcn(Recommender):
    """Ids propagated over the refined graph, beside the content of each modality: D + M C numbers.

    Prototypes: an item's content is leaky_relu(W f + b), a user's first prototype a learnt preference, all of
    length 1. A routing adds to the prototype the sum of its items' content, weighted by the softmax over the
    user's items of the inner products, and scales it to length 1 again. Refining: along every pair, in both
    directions, the affinity to the sender is the softmax over the receiver's neighbours of the inner products
    of prototype and content. The weight of a message is the largest, over modalities, of affinity times the
    sender's learnt confidence in that modality; below 0 it is pruned. Ids of length 1 are propagated with
    these weights and summed over layers; content is its own plus the sum of its neighbours' by affinity.

    Loss of a batch: BPR, plus l2 / 2 times the mean over rows of the squared lengths of ids and preferences.
    In MMRec's port the messages of the routing reach items only, so that prototypes stay where they are.
    """

    needs_features = True

    def __init__(
        self, train: Interactions, features: FeatureTable, config: GrcnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        n_nodes = self.n_users + self.n_items
        self.embeddings = xavier_uniform(rng, n_nodes, config.dim)  # users first
        self.preferences = nn.ParameterDict(
            {name: xavier_uniform(rng, self.n_users, config.content_dim) for name in features.modalities}
        )
        self.projections = nn.ModuleDict(
            {name: Affine(rng, width, config.content_dim) for name, width in features.dims.items()}
        )
        self.confidence = xavier_uniform(rng, n_nodes, len(features.modalities))
        graph = UserItemGraph(train)
        items, senders = self.n_users + graph.items, graph.users[graph.by_item]
        self._to_users = Edges.between(graph.users, items, n_nodes)
        self._to_all = Edges.between(
            torch.cat([graph.users, items[graph.by_item]]), torch.cat([items, senders]), n_nodes
        )

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Refine the graph by content, then propagate ids over it."""
        edges = self._to_all = self._to_all.to(self.embeddings.device)  # moved once, not in every step
        content, weights = [], []
        for place, (name, project) in enumerate(self.projections.items()):
            nodes = self._prototypes(self.preferences[name], project(features.vectors[name]))
            affinity = _affinity(edges, nodes)
            content.append(nodes + neighbour_sums(edges, affinity, nodes))
            weights.append(affinity * self.confidence[:, place].index_select(0, edges.targets))
        refined = torch.stack(weights).amax(dim=0).relu()
        layer = total = normalize(self.embeddings, dim=1)
        for _ in range(self.config.n_layers):
            layer = neighbour_sums(edges, refined, layer)
            total = total + layer
        nodes = torch.cat([total, *content], dim=1)
        return nodes[: self.n_users], nodes[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2."""
        users, items = self(features)
        item_rows = batch_items(batch)
        scores = pair_scores(rows_of(users, batch.users), rows_of(items, item_rows))
        own = [rows_of(self.embeddings, nodes) for nodes in (batch.users, self.n_users + item_rows)]
        own += [rows_of(table, batch.users) for table in self.preferences.values()]
        return bpr_loss(scores) + self.config.l2 / len(batch.users) * half_squared_norm(*own)

    def _prototypes(self, preference: Tensor, projected: Tensor) -> Tensor:
        """Return (U + I, C) prototypes of users after routing, and the items' content."""
        edges = self._to_users = self._to_users.to(preference.device)
        content = normalize(leaky_relu(projected), dim=1)
        prototypes = normalize(preference, dim=1)
        for _ in range(self.config.n_routings):
            nodes = torch.cat([prototypes, content])
            heard = neighbour_sums(edges, _affinity(edges, nodes), nodes)[: self.n_users]
            prototypes = normalize(prototypes + heard, dim=1)
        return torch.cat([prototypes, content])


def _affinity(edges: Edges, nodes: Tensor) -> Tensor:
    """Return the (E,) softmax, over the edges of each source, of the inner products of their ends.

    Nodes have length 1, so that no exponential gets large.
    """
    exps = edge_products(edges, nodes, nodes).exp()
    totals = exps.new_zeros(edges.n_nodes).index_add(0, edges.sources, exps)
    return exps / totals.index_select(0, edges.sources)
