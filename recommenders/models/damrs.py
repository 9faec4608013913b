"""DA-MRS: item graphs that modalities agree on, pairs trusted where content backs them, and two alignments.

Source: Xv, Li, Xie, Lin, Liu, Xia, Kang and Lin, "Improving multi-modal recommender systems by denoising and
aligning multi-modal content and user feedback", KDD 2024, in the form of the authors' code
(github.com/XMUDM/DA-MRS), with LightGCN as the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize, softplus
from typing_extensions import override

from recommenders.co_occurrence import co_occurrence_neighbours
from recommenders.feature_input import FeatureTable
from recommenders.graphs import mean_propagation, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.item_graphs import Edges, ItemGraph, are_live, cosine_weights, normalised
from recommenders.losses import half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.graded_relations import BLOCK_NUMBERS, graded_relations
from recommenders.propagation import KeptFor
from recommenders.ranges import Range
from recommenders.sampling import Batch

SEARCH: dict[str, Range] = {
    "n_layers": (1, 2, 3),
    "n_item_layers": (1, 2),
    "k": (3, 5, 10, 15, 20),
    "preference_weight": (0.01, 0.1, 1.0, 10.0),
    "relation_weight": (1e-4, 1e-3, 0.01, 0.1, 1.0),
}
"""What MMRec's configuration lists as tried."""

_SEARCH_NUMBERS = 1 << 24
"""Cosines of items with all items that are held at once for each modality while a graph is built: 64 MiB."""
_ROUNDING = 1e-6
"""By how much a cosine may be below the mean where all are alike."""


class DaMrsConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of DA-MRS; defaults of MMRec's configuration, which is the authors'."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(2, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times embeddings are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    behaviour_k: PositiveInt = Field(
        2, description="Items with most users in common that each item hears, beside itself."
    )
    min_common: PositiveInt = Field(2, description="Users two items must have in common to hear each other.")
    denoise: bool = Field(
        True, description="Weigh pairs by how far content backs them; if not, the ranking loss is BPR."
    )
    preference_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the alignment guided by users' preferences."
    )
    relation_weight: NonNegativeFloat = Field(
        1e-3, description="Weight of the alignment guided by graded relations of items."
    )
    n_positives: PositiveInt = Field(
        10, description="Related items of each grade in that alignment; at most half of all items."
    )
    temperature: PositiveFloat = Field(0.2, description="Temperature of that alignment.")
    l2: NonNegativeFloat = Field(
        0.0, description="Weight of the squared length of the unpropagated embeddings; the authors' is 0."
    )
    block_rows: NonNegativeInt = Field(
        0, description="Items whose neighbours are searched at once; 0 chooses them for 64 MiB a modality."
    )


class DaMrs(Recommender):
    """h_u is LightGCN's; h_i is LightGCN's plus the mean of the item's embedding smoothed by each item graph.

    Item graphs, all with edges of 1, D^-1/2 A D^-1/2, and every item among its own neighbours: for each
    modality the k nearest by cosine of those items that are at least as alike as two items are on average, in
    every modality; and from behaviour, the behaviour_k items with most users in common, min_common at least.
    A modality that either item lacks does not object, and has no edges of theirs. The graphs are frozen:
    built from the table given to the constructor, and anew for another constant table or by
    ``refresh_graph``. While rows are live, edges keep their values and get the gradient that weights by
    cosine would have, or no gradient would reach the features: scores read them through the graphs alone.

    Let h^g be what graph g makes of the embeddings, one for each modality and behaviour. Loss of a batch:

    Denoised BPR: the mean over rows (u, i, j) of -w+ ln sigmoid(x_ui - x_uj) - w- ln sigmoid(x_uj - x_ui).
    With p_g = sigmoid(h_u . h^g_i / |h^g_i|), w+ = mean_g(p) exp(-2 var_g(p)); and where mean_g(p) is below
    n, the mean of the same over all negatives, w- = max_g(p) - n, if positive; else 0. No gradient passes.

    preference_weight times alignment guided by preference: the mean over the batch's users and items of the
    divergence, both ways, of the chances sigmoid(a) and sigmoid(b), with a = h_u . z / |z| for LightGCN's
    item z, and b likewise for the mean of h^g. Both ways add up to (sigmoid(a) - sigmoid(b)) (a - b).

    relation_weight times ``graded_relations`` of the batch's items, each graph's rows scaled to length 1.

    Plus l2 / 2 times the mean over rows of the squared lengths of the unpropagated embeddings. The authors
    divide by no temperature in their chances, and neither does this.
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: DaMrsConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.register_buffer("adjacency", user_item_adjacency(train), persistent=False)
        self._behaviour = behaviour_graph(train, config.behaviour_k, config.min_common)
        self._n_graphs = len(features.modalities) + 1
        self._content = KeptFor(self._build, features)

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the graphs of the modalities from what the rows are now."""
        self._content.refresh(features)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate between users and items, and between items."""
        users, items, sides = self._propagate(features)
        return users, items + torch.stack(sides).mean(dim=0)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return denoised BPR, both alignments, and L2."""
        users, items, sides = self._propagate(features)
        content = torch.stack(sides).mean(dim=0)
        item_rows = batch_items(batch)
        taken, offered = rows_of(users, batch.users), rows_of(items + content, item_rows)
        scores = pair_scores(taken, offered)
        margins = scores[:, :1] - scores[:, 1:]
        ranked = softplus(-margins)
        if self.config.denoise:
            up, down = self._trust(taken, [rows_of(side, item_rows) for side in sides])
            ranked = up * ranked + down * softplus(margins)
        loss = ranked.mean()
        rows = torch.unique(item_rows)
        if self.config.preference_weight:
            distinct = rows_of(users, torch.unique(batch.users))
            ends = [rows_of(items, rows), rows_of(content, rows)]
            loss = loss + self.config.preference_weight * preference_alignment(distinct, *ends)
        if self.config.relation_weight:
            unit = [normalize(side, dim=1) for side in sides]
            graded = graded_relations(rows, unit, self.config.n_positives, self.config.temperature)
            loss = loss + self.config.relation_weight * graded
        own = [rows_of(self.embeddings, wanted) for wanted in (batch.users, self.n_users + item_rows)]
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(*own)

    @override
    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Add the alignments: of the batch's users with its items, and of a block of items with all."""
        rows = min(n_pairs * (1 + n_negatives), self.n_items)
        pairs, block = min(n_pairs, self.n_users) * rows, min(BLOCK_NUMBERS, rows * self.n_items)
        alignments = max(8 * pairs, 2 * (self._n_graphs + 1) * block)
        sides = 4 * self._n_graphs * self.n_items * self.config.dim
        return super().working_bytes(n_pairs, n_negatives) + 4 * (alignments + sides)

    def _propagate(self, features: FeatureTable) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return LightGCN's (U, D) and (I, D), and what each item graph makes of the items, (I, D)."""
        nodes = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        own = self.embeddings[self.n_users :]
        self._behaviour = self._behaviour.to(own.device)  # moved once, not in every step
        graphs = [*self._graphs(features), self._behaviour]
        sides = [graph.propagate(own, self.config.n_item_layers) for graph in graphs]
        return nodes[: self.n_users], nodes[self.n_users :], sides

    def _graphs(self, features: FeatureTable) -> list[ItemGraph]:
        """Return the graphs of the modalities; where rows are live, with gradient to them."""
        kept = self._content.of(features, training=self.training)
        graphs = {name: graph.to(self.embeddings.device) for name, graph in kept.items()}
        if not are_live(features):
            return list(graphs.values())
        live = []
        for name, graph in graphs.items():
            slopes = normalised(graph.edges, cosine_weights(graph.edges, features.vectors[name]))
            live.append(ItemGraph(graph.edges, graph.weights + (slopes - slopes.detach())))
        return live

    @torch.no_grad()
    def _trust(self, users: Tensor, sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return w+ and w-, (B, 1) each, from (B, D) users and (B, 1 + N, D) items by graph."""
        chances = torch.stack([pair_scores(users, normalize(side, dim=2)).sigmoid() for side in sides])
        positive, negatives = chances[:, :, :1], chances[:, :, 1:].mean()
        backing = positive.mean(dim=0)
        up = backing * torch.exp(-2 * positive.var(dim=0))
        down = (positive.amax(dim=0) - negatives).clamp_min(0) * (backing < negatives)
        return up, down

    def _build(self, features: FeatureTable) -> dict[str, ItemGraph]:
        edges = consistent_edges(features, self.config.k, self.config.block_rows)
        return {name: even_graph(found) for name, found in edges.items()}


def preference_alignment(users: Tensor, items: Tensor, content: Tensor) -> Tensor:
    """Return the mean over pairs of the divergence, both ways, of two chances that the user likes the item.

    Args:
        users: (S, D).
        items: (R, D) embeddings by behaviour; only their directions count.
        content: (R, D) of the same items, by content.
    """
    by_items = users @ normalize(items, dim=1).T
    by_content = users @ normalize(content, dim=1).T
    return ((by_items.sigmoid() - by_content.sigmoid()) * (by_items - by_content)).mean()


@torch.no_grad()
def consistent_edges(features: FeatureTable, k: int, block_rows: int = 0) -> dict[str, Edges]:
    """Return by modality each item's edges to its k nearest of those that all modalities find alike.

    Alike are two items whose cosine is at least the mean over all pairs of items that have the modality, an
    item with itself included. A modality that either of them lacks does not object. Every item has an edge to
    itself; one that lacks the modality, or holds zeros, has no other. Memory is I x k, and a block of cosines
    a modality.

    Args:
        features: Of I items.
        k: Edges of an item, that to itself included.
        block_rows: Items whose I cosines are held at once; 0 chooses them for 64 MiB.
    """
    unit, has, means = {}, {}, {}
    for name, vectors in features.vectors.items():
        unit[name] = normalize(vectors.float(), dim=1)
        has[name] = features.present[name] & (vectors != 0).any(dim=1)
        # The mean of all products is the product of the means.
        means[name] = unit[name][has[name]].mean(dim=0).square().sum() - _ROUNDING
    n_items = features.n_items
    own = torch.arange(n_items, device=next(iter(has.values())).device)
    sources: dict[str, list[Tensor]] = {name: [] for name in unit}
    targets: dict[str, list[Tensor]] = {name: [] for name in unit}
    step = block_rows or max(1, _SEARCH_NUMBERS // max(n_items, 1))
    for start in range(0, n_items, step):
        rows = own[start : start + step]
        cosines = {name: table[rows] @ table.T for name, table in unit.items()}
        both = {name: mask[rows].unsqueeze(1) & mask for name, mask in has.items()}
        alike = torch.stack([(cosines[name] >= means[name]) | ~both[name] for name in unit]).all(dim=0)
        for name, table in cosines.items():
            table.masked_fill_(~(alike & both[name]), -torch.inf)
            table[torch.arange(len(rows), device=rows.device), rows] = torch.inf  # the item itself is first
            best, found = table.topk(min(k, n_items), dim=1)
            kept = best > -torch.inf
            sources[name].append(rows.unsqueeze(1).expand_as(found)[kept])
            targets[name].append(found[kept])
    return {name: Edges.between(torch.cat(sources[name]), torch.cat(targets[name]), n_items) for name in unit}


def behaviour_graph(train: Interactions, k: int, min_common: int) -> ItemGraph:
    """Return the graph of each item's k items with most users in common, min_common at least, and itself."""
    neighbours, common = co_occurrence_neighbours(
        train.csr().T.tocsr(),
        k,
        lambda counts, _rows, _columns: counts * (counts >= min_common).astype(float),
    )
    listed = common > 0
    own = np.arange(train.n_items)
    sources = np.concatenate([own, np.broadcast_to(own[:, None], neighbours.shape)[listed]])
    targets = np.concatenate([own, neighbours[listed]])
    order = np.argsort(sources, kind="stable")
    ends = torch.from_numpy(sources[order]), torch.from_numpy(targets[order])
    return even_graph(Edges.between(*ends, train.n_items))


def even_graph(edges: Edges) -> ItemGraph:
    """Return edges of 1, normalised: D^-1/2 A D^-1/2."""
    return ItemGraph(edges, normalised(edges, torch.ones(len(edges.sources), device=edges.sources.device)))
