from __future__ import annotations

import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.propagation import (
    KeptFor,
    UserItemMatrix,
    spread_from_items,
    spread_rows,
    symmetric_product,
)
from tests.references.plain_graphs import bipartite, symmetric, user_item_matrix
from tests.worlds import random_world

TRAIN = random_world(n_users=8, n_items=11, density=0.5).split.train


def dense(matrix) -> torch.Tensor:
    return torch.from_numpy(matrix).float()


def test_a_symmetric_product_and_its_gradient_are_those_of_the_dense_matrix() -> None:
    adjacency = dense(bipartite(user_item_matrix(TRAIN)))
    table = torch.randn(19, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(19, 4, generator=torch.Generator().manual_seed(1))
    product = symmetric_product(UserItemGraph(TRAIN).adjacency(), table)
    torch.testing.assert_close(product, adjacency @ table)
    (product * weights).sum().backward()
    torch.testing.assert_close(table.grad, adjacency.T @ weights)


def test_user_item_matrices_and_their_gradients_are_those_of_the_dense_ones() -> None:
    graph, ones = UserItemGraph(TRAIN), user_item_matrix(TRAIN)
    drawn = torch.rand(len(graph), generator=torch.Generator().manual_seed(0))
    uneven = torch.zeros(8, 11)
    uneven[graph.users, graph.items] = drawn
    for matrix, expected in (
        (UserItemMatrix.symmetric(graph), dense(symmetric(ones))),
        (UserItemMatrix.mean(graph), dense(ones / ones.sum(axis=1, keepdims=True))),
        (UserItemMatrix(graph, drawn), uneven),
    ):
        for product, factor in ((matrix.to_users, expected), (matrix.to_items, expected.T)):
            n_rows, n_columns = factor.shape
            table = torch.randn(n_columns, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
            weights = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(2))
            result = product(table)
            torch.testing.assert_close(result, factor @ table)
            (result * weights).sum().backward()
            torch.testing.assert_close(table.grad, factor.T @ weights)


def table_of(value: float, *, live: bool = False) -> FeatureTable:
    return FeatureTable(
        {"text": torch.full((2, 1), float(value), requires_grad=live)},
        {"text": torch.ones(2, dtype=torch.bool)},
    )


def value_of(features: FeatureTable) -> float:
    return float(features.vectors["text"].detach()[0, 0])


def test_what_is_kept_is_made_anew_for_another_table_only() -> None:
    made: list[float] = []
    first, second = table_of(1), table_of(2)

    def make(features: FeatureTable) -> float:
        made.append(value_of(features))
        return made[-1]

    kept = KeptFor(make, first)
    assert [kept.of(table, training=True) for table in (first, first, second, second)] == [1, 1, 2, 2]
    assert made == [1, 2]


def test_a_measurement_on_another_table_leaves_no_trace() -> None:
    first, second = table_of(1), table_of(2)
    kept = KeptFor(value_of, first)
    assert kept.of(second, training=False) == 2
    assert kept.of(first, training=False) == 1
    assert kept.of(table_of(3, live=True), training=True) == 1


def test_live_rows_keep_what_is_kept_until_it_is_refreshed() -> None:
    kept = KeptFor(value_of, table_of(1))
    live = table_of(3, live=True)
    assert kept.of(live, training=True) == 1
    kept.refresh(live)
    assert kept.of(table_of(4, live=True), training=True) == 3


def test_a_table_that_was_written_to_is_another_table() -> None:
    features = table_of(1)
    kept = KeptFor(value_of, features)
    features.vectors["text"].fill_(5)
    assert kept.of(features, training=True) == 5


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3, 4])
def test_spread_rows_and_their_gradients_are_those_of_the_sum_of_powers_of_the_dense_graph(
    n_layers: int,
) -> None:
    users, items = torch.tensor([6, 1, 2]), torch.tensor([10, 0, 4, 7])
    matrix = UserItemMatrix.symmetric(UserItemGraph(TRAIN))
    adjacency = torch.from_numpy(bipartite(user_item_matrix(TRAIN)))
    layers = sum(torch.linalg.matrix_power(adjacency, power) for power in range(n_layers + 1)).float()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(8, 3, generator=generator), torch.randn(11, 3, generator=generator)]
    found, expected = ([table.clone().requires_grad_() for table in drawn] for _ in range(2))
    spread = spread_rows(matrix, (found[0], found[1]), n_layers, (users, items))
    of_users, of_items = layers[:, :8] @ expected[0], layers[:, 8:] @ expected[1]
    plain = [
        expected[0][users],
        expected[1][items],
        of_users[:8][users],
        of_users[8:][items],
        of_items[:8][users],
        of_items[8:][items],
    ]
    rows = [*spread.own, *spread.from_users, *spread.from_items]
    weights = [torch.randn(row.shape, generator=generator) for row in rows]
    for one, other in zip(rows, plain, strict=True):
        torch.testing.assert_close(one, other)
    for values in (rows, plain):
        sum((row * weight).sum() for row, weight in zip(values, weights, strict=True)).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3, 4])
def test_what_spreads_from_items_is_their_part_of_the_sum_of_the_layers(n_layers: int) -> None:
    graph = UserItemGraph(TRAIN)
    items = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([torch.zeros(8, 3), items])
    mean = mean_propagation(graph.adjacency(), alone, n_layers)
    of_users, of_items = spread_from_items(UserItemMatrix.symmetric(graph), items, n_layers)
    torch.testing.assert_close(torch.cat([of_users, of_items]), (n_layers + 1) * mean)
