from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from recommenders.feature_input import FeatureTable
from recommenders.item_graphs import (
    Edges,
    ItemGraph,
    SeenFeatures,
    blend,
    cosine_weights,
    edge_products,
    knn_edges,
    modality_shares,
    neighbour_sums,
    normalised,
)
from tests.references.plain_item_graph import cosine, dense_knn, dense_normalised

N, D = 9, 4


def dense(graph: ItemGraph) -> np.ndarray:
    matrix = np.zeros((graph.edges.n_nodes, graph.edges.n_nodes))
    entries = zip(graph.edges.sources, graph.edges.targets, graph.weights.detach(), strict=True)
    for source, target, weight in entries:
        matrix[source, target] += float(weight)
    return matrix


def some_graph() -> tuple[Edges, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sources = torch.tensor([0, 0, 1, 3, 3, 3, 4, 8, 8])
    targets = torch.tensor([1, 1, 0, 3, 5, 8, 2, 8, 0])  # 0 -> 1 occurs twice; 2, 5, 6 and 7 have no edge
    return Edges.between(sources, targets, N), torch.randn(len(sources), generator=generator)


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("block_rows", [0, 2])
def test_edges_lead_to_the_k_nearest_present_items_and_the_item_itself(
    k: int, block_rows: int, vectors: Tensor
) -> None:
    present = torch.ones(N, dtype=torch.bool)
    present[[2, 7]] = False
    vectors[5] = 0
    edges = knn_edges(vectors, present, k, block_rows)
    found = dense(ItemGraph(edges, torch.ones(len(edges.sources))))
    expected = dense_knn(vectors.double().numpy(), present.numpy() & (np.arange(N) != 5), k)
    np.testing.assert_array_equal(found, expected)


def test_weights_are_cosines_without_negative_ones_and_normalised_by_both_degrees(vectors: Tensor) -> None:
    edges = knn_edges(vectors, torch.ones(N, dtype=torch.bool), 5)
    weights = cosine_weights(edges, vectors)
    table = vectors.double().numpy()
    expected = dense_knn(table, np.ones(N, dtype=bool), 5) * np.maximum(cosine(table), 0)
    assert (cosine(table)[dense_knn(table, np.ones(N, dtype=bool), 5) > 0] < 0).any()
    np.testing.assert_allclose(dense(ItemGraph(edges, weights)), expected, atol=1e-6)
    graph = ItemGraph(edges, normalised(edges, weights))
    np.testing.assert_allclose(dense(graph), dense_normalised(expected), atol=1e-6)


def test_propagation_is_the_dense_product() -> None:
    edges, weights = some_graph()
    graph = ItemGraph(edges, weights)
    table = torch.randn(N, D)
    expected = dense(graph) @ dense(graph) @ table.double().numpy()
    np.testing.assert_allclose(graph.propagate(table, n_layers=2), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_sums_and_products_are_those_of_the_dense_ones(vectors: Tensor) -> None:
    edges, weights = some_graph()
    sparse_inputs = [weights.clone().requires_grad_(), vectors.clone().requires_grad_()]
    dense_inputs = [tensor.detach().clone().requires_grad_() for tensor in sparse_inputs]
    direction = torch.randn(N, D)

    matrix = torch.zeros(N, N).index_put((edges.sources, edges.targets), dense_inputs[0], accumulate=True)
    products = (dense_inputs[1][edges.sources] * direction[edges.targets]).sum(dim=1)
    ((matrix @ dense_inputs[1] * direction).sum() + (products * weights).sum()).backward()

    sums = neighbour_sums(edges, *sparse_inputs)
    products = edge_products(edges, sparse_inputs[1], direction)
    ((sums * direction).sum() + (products * weights).sum()).backward()
    for found, expected in zip(sparse_inputs, dense_inputs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_cosine_weights_let_gradient_through_to_both_ends(vectors: Tensor) -> None:
    edges = knn_edges(vectors, torch.ones(N, dtype=torch.bool), 3)
    live = vectors.clone().requires_grad_()
    again = vectors.clone().requires_grad_()
    direction = torch.randn(len(edges.sources))
    (normalised(edges, cosine_weights(edges, live)) * direction).sum().backward()
    unit = torch.nn.functional.normalize(again, dim=1)
    matrix = torch.zeros(N, N)
    matrix[edges.sources, edges.targets] = 1
    weights = (unit @ unit.T).clamp_min(0) * matrix
    roots = weights.sum(dim=1).rsqrt()
    ((roots[:, None] * weights * roots)[edges.sources, edges.targets] * direction).sum().backward()
    torch.testing.assert_close(live.grad, again.grad)


@pytest.mark.parametrize(
    ("modalities", "shares"),
    [
        (("image", "text"), [0.1, 0.9]),
        (("text", "image", "audio"), [0.45, 0.1, 0.45]),
        (("image",), [1.0]),
        (("text", "audio"), [0.5, 0.5]),
    ],
)
def test_shares_add_up_whatever_the_modalities(modalities: tuple[str, ...], shares: list[float]) -> None:
    found = modality_shares(modalities, 0.1)
    assert list(found) == list(modalities)
    assert list(found.values()) == pytest.approx(shares)


def test_a_blend_is_the_weighted_sum_of_its_graphs(vectors: Tensor) -> None:
    edges, weights = some_graph()
    knn = knn_edges(vectors, torch.ones(N, dtype=torch.bool), 3)
    graphs = {"image": ItemGraph(edges, weights), "text": ItemGraph(knn, torch.ones(len(knn.sources)))}
    mixed = blend(graphs, {"image": 0.3, "text": 0.7})
    expected = 0.3 * dense(graphs["image"]) + 0.7 * dense(graphs["text"])
    np.testing.assert_allclose(dense(mixed), expected, atol=1e-6)
    assert (mixed.edges.sources.diff() >= 0).all()


def test_a_graph_without_any_edge_sums_to_zeros() -> None:
    edges = knn_edges(torch.randn(N, D), torch.zeros(N, dtype=torch.bool), 3)
    table = torch.randn(N, D, requires_grad=True)
    weights = normalised(edges, cosine_weights(edges, table))
    sums = neighbour_sums(edges, weights, table)
    sums.sum().backward()
    assert sums.abs().max() == 0
    assert table.grad is not None
    assert table.grad.abs().max() == 0


def test_features_are_recognised_by_identity_and_by_what_was_written_to_them(vectors: Tensor) -> None:
    table = FeatureTable({"image": vectors}, {"image": torch.ones(N, dtype=torch.bool)})
    seen = SeenFeatures(table)
    assert seen.are(table)
    assert seen.are(FeatureTable(table.vectors, table.present))
    assert not seen.are(FeatureTable({"image": vectors.clone()}, table.present))
    vectors[0] = 3
    assert not seen.are(table)
