from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.neighbours import cosine_neighbours
from tests.references.plain_item_knn import nearest


@pytest.mark.parametrize("block_rows", [0, 1, 4, 11, 100])
def test_neighbours_match_the_plain_loop_whatever_the_block(block_rows: int) -> None:
    vectors = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    neighbours, similarities = cosine_neighbours(vectors, 3, block_rows)
    for item in range(11):
        expected = nearest(vectors.double().numpy(), item, 3)
        assert neighbours[item].tolist() == [j for j, _ in expected]
        np.testing.assert_allclose(similarities[item], [value for _, value in expected], rtol=1e-5)


def test_an_item_is_not_its_own_neighbour_even_among_copies_of_itself() -> None:
    neighbours, similarities = cosine_neighbours(torch.ones(5, 3), 2)
    assert (neighbours != torch.arange(5)[:, None]).all()
    torch.testing.assert_close(similarities, torch.ones(5, 2))


@pytest.mark.parametrize(("n_items", "expected_k"), [(1, 0), (3, 2)])
def test_lists_are_as_long_as_there_are_other_items(n_items: int, expected_k: int) -> None:
    neighbours, similarities = cosine_neighbours(torch.randn(n_items, 3), 10)
    assert neighbours.shape == similarities.shape == (n_items, expected_k)


def test_a_row_of_zeros_has_cosine_zero_with_every_row() -> None:
    vectors = torch.randn(6, 3)
    vectors[2] = 0
    _, similarities = cosine_neighbours(vectors, 5)
    assert similarities[2].abs().max() == 0
    assert similarities.isfinite().all()


def clustered(n_items: int) -> torch.Tensor:
    """Rows around some hundred centres, as embeddings of a catalogue lie."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n_items // 40, 24, generator=generator)
    return centres.repeat(40, 1)[:n_items] + 0.4 * torch.randn(n_items, 24, generator=generator)


def test_an_index_finds_nearly_the_same_neighbours_with_their_true_cosines() -> None:
    vectors = clustered(4000)
    exact, _ = cosine_neighbours(vectors, 10)
    found, similarities = cosine_neighbours(vectors, 10, exact_up_to=1000)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    assert np.mean(shared) / 10 > 0.9
    unit = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(similarities, (unit[:, None] * unit[found]).sum(dim=2), atol=1e-5, rtol=0)
    assert (similarities.diff(dim=1) <= 1e-6).all()
    assert (found != torch.arange(4000)[:, None]).all()
    assert torch.equal(found, cosine_neighbours(vectors, 10, exact_up_to=1000)[0])


def test_an_index_gives_full_lists_of_different_items_even_where_its_own_lists_are_short() -> None:
    vectors = torch.eye(200)[torch.arange(400) % 200] + 1e-3 * clustered(400)[:, :1]
    neighbours, similarities = cosine_neighbours(vectors, 150, exact_up_to=10)
    assert neighbours.shape == (400, 150)
    assert all(len(set(row)) == 150 for row in neighbours.tolist())
    assert (neighbours != torch.arange(400)[:, None]).all()
    assert neighbours.min() >= 0
    assert similarities.isfinite().all()
