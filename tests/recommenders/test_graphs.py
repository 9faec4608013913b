from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from recommenders.graphs import (
    UserItemGraph,
    mean_propagation,
    sparse_product,
    user_item_adjacency,
)
from tests.references.plain_lightgcn import propagate
from tests.worlds import interactions_of, random_world


def test_adjacency_holds_one_over_the_root_of_both_degrees() -> None:
    train = interactions_of([(0, 0), (0, 1), (1, 1)], n_users=3, n_items=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjacency = user_item_adjacency(train)
    half, root = 0.5, 0.5**0.5
    expected = [
        [0, 0, 0, root, half],
        [0, 0, 0, 0, root],
        [0, 0, 0, 0, 0],
        [root, 0, 0, 0, 0],
        [half, root, 0, 0, 0],
    ]
    torch.testing.assert_close(adjacency.to_dense(), torch.tensor(expected))
    assert adjacency.layout == torch.sparse_csr
    assert adjacency.col_indices().dtype == torch.int32


def test_repeated_pairs_are_one_edge() -> None:
    once = interactions_of([(0, 0), (0, 1), (1, 1)], n_users=2, n_items=2)
    twice = interactions_of([(1, 1), (0, 0), (0, 1), (0, 1)], n_users=2, n_items=2)
    assert torch.equal(user_item_adjacency(once).to_dense(), user_item_adjacency(twice).to_dense())


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_propagation_is_the_mean_over_layers(n_layers: int) -> None:
    train = random_world(n_users=6, n_items=8).split.train
    embeddings = torch.randn(14, 5, generator=torch.Generator().manual_seed(0))
    found = mean_propagation(user_item_adjacency(train), embeddings, n_layers)
    pairs = list(zip(train.user_rows, train.item_rows, strict=True))
    expected = propagate(pairs, 6, embeddings.double().numpy(), n_layers)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_propagation_is_exact_and_can_be_taken_twice() -> None:
    adjacency = user_item_adjacency(random_world(n_users=4, n_items=5).split.train).double()
    embeddings = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return mean_propagation(adjacency, x, 3)

    assert torch.autograd.gradcheck(smooth, embeddings)
    assert torch.autograd.gradgradcheck(smooth, embeddings)


def test_the_graph_of_all_pairs_is_the_adjacency_and_of_some_that_of_a_smaller_training_set() -> None:
    train = random_world(n_users=6, n_items=8).split.train
    graph = UserItemGraph(train)
    torch.testing.assert_close(graph.adjacency().to_dense(), user_item_adjacency(train).to_dense())
    kept = torch.arange(len(graph)) % 3 > 0
    pairs = list(zip(graph.users[kept].tolist(), graph.items[kept].tolist(), strict=True))
    fewer = user_item_adjacency(interactions_of(pairs, n_users=6, n_items=8))
    torch.testing.assert_close(graph.adjacency(kept).to_dense(), fewer.to_dense())
    assert not graph.state_dict()


def test_pairs_are_drawn_without_replacement_by_their_weights_and_the_seed() -> None:
    graph = UserItemGraph(random_world(n_users=8, n_items=12).split.train)
    n_pairs = len(graph)
    assert n_pairs > 8
    weights = torch.ones(n_pairs)
    weights[:4] = 9
    torch.manual_seed(0)
    draws = torch.stack([graph.sample(1, weights) for _ in range(4000)])
    assert (draws.sum(dim=1) == 1).all()
    shares = draws.double().mean(dim=0)
    torch.testing.assert_close(shares, (weights / weights.sum()).double(), atol=0.02, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(graph.sample(1, weights), draws[0])
    assert graph.sample(5).sum() == 5
    assert graph.sample(n_pairs).all()


def test_a_sparse_product_is_the_dense_one() -> None:
    adjacency = user_item_adjacency(random_world(n_users=6, n_items=8).split.train)
    table = torch.randn(14, 3)
    torch.testing.assert_close(sparse_product(adjacency, table), adjacency.to_dense() @ table)
