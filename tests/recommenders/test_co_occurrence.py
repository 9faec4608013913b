from __future__ import annotations

import numpy as np
import torch

from recommenders.co_occurrence import co_occurrence_neighbours, user_graph
from tests.references import plain_dualgnn
from tests.references.plain_graphs import user_item_matrix
from tests.worlds import interactions_of, random_world


def test_the_user_graph_is_the_plain_one() -> None:
    train = random_world(n_users=20, n_items=15).split.train
    graph = user_graph(train, 4)
    dense = np.zeros((20, 20))
    dense[graph.edges.sources, graph.edges.targets] = graph.weights
    np.testing.assert_allclose(dense, plain_dualgnn.user_graph(user_item_matrix(train), 4), rtol=1e-5)


def test_users_without_common_items_hear_nobody() -> None:
    train = interactions_of([(0, 0), (1, 1), (2, 1)], n_users=4, n_items=2)
    graph = user_graph(train, 3)
    table = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    assert graph.propagate(table).tolist() == [[0.0], [4.0], [2.0], [0.0]]


def test_neighbours_found_in_blocks_are_those_found_at_once() -> None:
    matrix = random_world(n_users=20, n_items=15).split.train.csr()
    found = [
        co_occurrence_neighbours(matrix, 4, lambda counts, rows, columns: counts, block_rows)
        for block_rows in (0, 3)
    ]
    for whole, blocks in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, blocks)
