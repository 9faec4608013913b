"""Graphs between items that resemble each other: sparse, of any modalities, with gradient where it is wanted.

Nothing here is I x I. A graph is its edges: k for each item that has the modality, none for the others.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from recommenders.feature_input import FeatureTable
from recommenders.graphs import bag_sums, outside_compiler
from recommenders.neighbours import cosine_neighbours


@dataclass(frozen=True, eq=False)
class Edges:
    """Directed edges between N nodes, ordered by source, and the same ones in the order of their targets."""

    sources: Tensor
    """(E,) int64, ascending."""
    targets: Tensor
    """(E,) int64; item ``sources[e]`` listens to item ``targets[e]``."""
    starts: Tensor
    """(N + 1,) where the edges of each source begin."""
    order: Tensor
    """(E,) the edges in the order of their targets."""
    ordered_sources: Tensor
    """(E,) ``sources[order]``."""
    target_starts: Tensor
    """(N + 1,) where the edges of each target begin in ``order``."""

    @staticmethod
    def between(sources: Tensor, targets: Tensor, n_nodes: int) -> Edges:
        """Return edges from (E,) sources, ascending, to (E,) targets; the same edge may occur twice."""
        order = targets.argsort(stable=True)
        starts, target_starts = _starts(sources, n_nodes), _starts(targets, n_nodes)
        return Edges(sources, targets, starts, order, sources[order], target_starts)

    @property
    def n_nodes(self) -> int:
        """N."""
        return len(self.starts) - 1

    def to(self, device: torch.device) -> Edges:
        """Return the same edges on another device, itself where they are there."""
        if self.sources.device == device:
            return self
        return Edges(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class ItemGraph:
    """Weighted edges between items."""

    edges: Edges
    weights: Tensor
    """(E,) float32."""

    def to(self, device: torch.device) -> ItemGraph:
        """Return the same graph on another device."""
        return ItemGraph(self.edges.to(device), self.weights.to(device))

    def propagate(self, table: Tensor, n_layers: int = 1) -> Tensor:
        """Return ``A^L x`` for an (I, D) table; gradients reach the table, and weights that want any."""
        for _ in range(n_layers):
            table = neighbour_sums(self.edges, self.weights, table)
        return table


def _starts(rows: Tensor, n_nodes: int) -> Tensor:
    counts = torch.bincount(rows, minlength=n_nodes)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@torch.no_grad()
def knn_edges(vectors: Tensor, present: Tensor, k: int, block_rows: int = 0) -> Edges:
    """Return each item's edges to its k nearest items by cosine, exactly, in I x k memory.

    The item itself is the first of the k: the graphs of LATTICE and FREEDOM keep the k largest of a row of
    similarities whose diagonal is 1. Absent items and rows of zeros, which resemble nothing, have no edges.

    Args:
        vectors: (I, F) floats.
        present: (I,) bool, which items have the modality.
        k: Edges of an item, that to itself included.
        block_rows: Items whose I similarities are held at once; 0 chooses them for 128 MiB.
    """
    rows = (present & (vectors != 0).any(dim=1)).nonzero().squeeze(1)
    others, _ = cosine_neighbours(vectors[rows], k - 1, block_rows)
    own = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    lists = torch.cat([own, others], dim=1).sort(dim=1).values  # (P, k), P items with a vector
    return Edges.between(rows.repeat_interleave(lists.shape[1]), rows[lists.reshape(-1)], len(vectors))


def cosine_weights(edges: Edges, vectors: Tensor) -> Tensor:
    """Return the (E,) cosines of the ends of each edge, negative ones as 0; gradients reach the vectors.

    Source: Zhang et al., "Mining latent structures for multimedia recommendation", MM 2021, eq. 1, and its
    remark that an adjacency matrix is to have no negative entries.
    """
    unit = normalize(vectors.float(), dim=1)
    return edge_products(edges, unit, unit).clamp_min(0)


def normalised(edges: Edges, weights: Tensor) -> Tensor:
    """Return the (E,) weights ``w_ij / sqrt(d_i d_j)`` with d the sums of rows; gradients reach the weights.

    Source: Zhang et al., MM 2021, eq. 3: D^-1/2 S D^-1/2.
    """
    degrees = weights.new_zeros(edges.n_nodes).index_add(0, edges.sources, weights)
    # A node without edges, or with weights of 0 only, has degree 0; nothing multiplies its root.
    roots = degrees.clamp_min(1e-12).rsqrt()
    return weights * roots.index_select(0, edges.sources) * roots.index_select(0, edges.targets)


def modality_shares(modalities: Sequence[str], image_share: float) -> dict[str, float]:
    """Return each modality's share in a blend; they add up to 1.

    The modality called ``image`` gets its share and the others the rest in equal parts. Where there is no
    image, or nothing else, all get equal parts.
    """
    others = [name for name in modalities if name != "image"]
    if not others or len(others) == len(modalities):
        return dict.fromkeys(modalities, 1 / len(modalities))
    return {name: image_share if name == "image" else (1 - image_share) / len(others) for name in modalities}


def blend(graphs: Mapping[str, ItemGraph], shares: Mapping[str, float]) -> ItemGraph:
    """Return the weighted sum of graphs over the same items; an edge of two graphs stays two edges."""
    sources = torch.cat([graph.edges.sources for graph in graphs.values()])
    targets = torch.cat([graph.edges.targets for graph in graphs.values()])
    weights = torch.cat([shares[name] * graph.weights for name, graph in graphs.items()])
    n_nodes = next(iter(graphs.values())).edges.n_nodes
    order = sources.argsort(stable=True)
    return ItemGraph(Edges.between(sources[order], targets[order], n_nodes), weights[order])


@torch.no_grad()
def cosine_graph(vectors: Tensor, present: Tensor, k: int, block_rows: int = 0) -> ItemGraph:
    """Return the kNN graph of one modality whose edges weigh their cosine, ``D^-1/2 S D^-1/2``.

    Args:
        vectors: (I, F) floats.
        present: (I,) bool, which items have the modality.
        k: Edges of an item, that to itself included.
        block_rows: As for ``knn_edges``.
    """
    edges = knn_edges(vectors, present, k, block_rows)
    return ItemGraph(edges, normalised(edges, cosine_weights(edges, vectors)))


@torch.no_grad()
def blended_even_graph(features: FeatureTable, k: int, image_share: float, block_rows: int = 0) -> ItemGraph:
    """Return the blend over modalities of kNN graphs whose edges all weigh 1, ``D^-1/2 S D^-1/2``.

    Source: Zhou and Shen, "A tale of two graphs: Freezing and denoising graph structures for multimodal
    recommendation", MM 2023, eq. 1 to 4.
    """
    graphs = {}
    for name, vectors in features.vectors.items():
        edges = knn_edges(vectors, features.present[name], k, block_rows)
        ones = torch.ones(len(edges.sources), device=vectors.device)
        graphs[name] = ItemGraph(edges, normalised(edges, ones))
    return blend(graphs, modality_shares(list(graphs), image_share))


class SeenFeatures:
    """Remembers from which feature table something was made, without keeping the table alive.

    A table is the same when its tensors are the same objects and nobody has written to them since.
    """

    def __init__(self, features: FeatureTable) -> None:
        self._tensors = {name: weakref.ref(tensor) for name, tensor in _tensors_of(features).items()}
        self._versions = {name: tensor._version for name, tensor in _tensors_of(features).items()}

    def are(self, features: FeatureTable) -> bool:
        """Tell whether this is that table, unchanged."""
        tensors = _tensors_of(features)
        return list(tensors) == list(self._tensors) and all(
            self._tensors[name]() is tensor and self._versions[name] == tensor._version
            for name, tensor in tensors.items()
        )


def are_live(features: FeatureTable) -> bool:
    """Tell whether some rows carry gradient, as in joint training, where the table is another every batch."""
    return torch.is_grad_enabled() and any(table.requires_grad for table in features.vectors.values())


def _tensors_of(features: FeatureTable) -> dict[str, Tensor]:
    present = {f"present {name}": mask for name, mask in features.present.items()}
    return dict(features.vectors) | present


@outside_compiler
def neighbour_sums(edges: Edges, weights: Tensor, table: Tensor) -> Tensor:
    """Return (N, D) rows ``sum over the edges i -> j of w_ij x_j``; gradients reach weights and table.

    Args:
        edges: Between N nodes.
        weights: (E,).
        table: (N, D), x.
    """
    result: Tensor = _NeighbourSums.apply(edges, weights, table)
    return result


@outside_compiler
def edge_products(edges: Edges, left: Tensor, right: Tensor) -> Tensor:
    """Return the (E,) inner products ``l_i . r_j`` of the edges i -> j, without (E, D) numbers in memory.

    Args:
        edges: Between N nodes.
        left: (N, D), l.
        right: (N, D), r.
    """
    result: Tensor = _EdgeProducts.apply(edges, left, right)
    return result


def _sums_of_targets(edges: Edges, weights: Tensor, table: Tensor) -> Tensor:
    return bag_sums(edges.targets, edges.starts, weights, table.contiguous())


def _sums_of_sources(edges: Edges, weights: Tensor, table: Tensor) -> Tensor:
    ordered = weights.index_select(0, edges.order)
    return bag_sums(edges.ordered_sources, edges.target_starts, ordered, table.contiguous())


def _products(edges: Edges, left: Tensor, right: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            edges.starts,
            edges.targets,
            left.new_zeros(len(edges.targets)),
            size=(edges.n_nodes, edges.n_nodes),
            check_invariants=False,
        )
    products: Tensor = torch.sparse.sampled_addmm(pattern, left.contiguous(), right.T, beta=0.0).values()
    return products.clone()  # no view of a sparse tensor, which torch.compile cannot take


class _NeighbourSums(torch.autograd.Function):
    """y_i = sum_j w_ij x_j, so that dx_j = sum_i w_ij dy_i and dw_ij = dy_i . x_j."""

    @staticmethod
    def forward(ctx: Any, edges: Edges, weights: Tensor, table: Tensor) -> Tensor:
        ctx.edges = edges
        ctx.save_for_backward(weights, table)
        return _sums_of_targets(edges, weights, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        weights, table = ctx.saved_tensors
        _, wants_weights, wants_table = ctx.needs_input_grad
        return (
            None,
            _products(ctx.edges, gradient, table) if wants_weights else None,
            _sums_of_sources(ctx.edges, weights, gradient) if wants_table else None,
        )


class _EdgeProducts(torch.autograd.Function):
    """p_ij = l_i . r_j, so that dl_i = sum_j dp_ij r_j and dr_j = sum_i dp_ij l_i."""

    @staticmethod
    def forward(ctx: Any, edges: Edges, left: Tensor, right: Tensor) -> Tensor:
        ctx.edges = edges
        ctx.save_for_backward(left, right)
        return _products(edges, left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        left, right = ctx.saved_tensors
        _, wants_left, wants_right = ctx.needs_input_grad
        return (
            None,
            _sums_of_targets(ctx.edges, gradient, right) if wants_left else None,
            _sums_of_sources(ctx.edges, gradient, left) if wants_right else None,
        )
