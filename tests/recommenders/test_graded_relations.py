from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from recommenders.models import graded_relations as module
from recommenders.models.graded_relations import graded_relations


def plain(rows: Tensor, graphs: list[Tensor], k: int, temperature: float) -> Tensor:
    """The same with whole tables and gradients by torch."""
    cosines = [table[rows] @ table.T for table in graphs]
    chances = [table.softmax(dim=1).detach() for table in cosines]
    total = sum(chances, torch.zeros_like(chances[0]))
    losses = []
    for table, own in zip(cosines, chances, strict=True):
        for row in range(len(rows)):
            ranked = sorted(range(table.shape[1]), key=lambda item: -float((total + own)[row, item]))
            first, others = ranked[:k], ranked[k:]
            second = sorted(others, key=lambda item: -float(own[row, item]))[:k]
            scaled = table[row] / temperature
            losses.append(scaled.logsumexp(0) - scaled[first].logsumexp(0))
            losses.append(scaled[others].logsumexp(0) - scaled[second].logsumexp(0))
    return torch.stack(losses).sum() / (len(rows) * len(graphs))


@pytest.mark.parametrize("n_graphs", [1, 3])
@pytest.mark.parametrize("temperature", [0.2, 0.01])  # exponentials that are safe, and that are not
@pytest.mark.parametrize("numbers", [1, 1 << 20])  # row by row, and all at once
def test_graded_relations_and_their_gradients_are_those_of_whole_tables(
    numbers: int, temperature: float, n_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([4, 0, 11, 7])
    drawn = [torch.randn(12, 3, dtype=torch.float64, generator=generator) for _ in range(n_graphs)]
    found, expected = ([table.clone().requires_grad_() for table in drawn] for _ in range(2))
    value = graded_relations(rows, [normalize(table, dim=1) for table in found], 3, temperature)
    right = plain(rows, [normalize(table, dim=1) for table in expected], 3, temperature)
    torch.testing.assert_close(value, right)
    (2 * value).backward()
    (2 * right).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_half_of_the_items_are_positives_at_most() -> None:
    table = normalize(
        torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    rows = torch.arange(5)
    torch.testing.assert_close(
        graded_relations(rows, [table], 9, 0.2), graded_relations(rows, [table], 2, 0.2)
    )
