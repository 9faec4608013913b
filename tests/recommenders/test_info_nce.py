from __future__ import annotations

import pytest
import torch

from recommenders import info_nce as info_nce_module
from recommenders.info_nce import info_nce, info_nce_of_pairs


@pytest.mark.parametrize("length", [0.5, 30])  # products up to 60, whose exp is safe, and beyond
@pytest.mark.parametrize("block", [1, 3, 256])
def test_info_nce_is_the_cross_entropy_of_the_products_with_its_gradients(
    block: int, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info_nce_module, "_BLOCK_ANCHORS", block)
    generator = torch.Generator().manual_seed(0)
    found, expected = [], []
    anchors, others = torch.randn(7, 3, generator=generator), length * torch.randn(9, 3, generator=generator)
    for inputs in (found, expected):
        inputs += [anchors.clone().requires_grad_(), others.clone().requires_grad_()]
    value = info_nce(*found, 0.1)
    (2 * value).backward()
    plain = torch.nn.functional.cross_entropy(expected[0] @ expected[1].T / 0.1, torch.arange(7))
    (2 * plain).backward()
    torch.testing.assert_close(value, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("length", [0.5, 30])
@pytest.mark.parametrize("block", [2, 256])
def test_info_nce_of_pairs_is_that_of_the_rows_that_they_name(
    block: int, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info_nce_module, "_BLOCK_ANCHORS", block)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.tensor([0, 2, 2, 4, 2, 1]), torch.tensor([3, 0, 3, 3, 1, 0])  # 3 and 2 in no pair
    tables = torch.randn(5, 3, generator=generator), length * torch.randn(4, 3, generator=generator)
    found, expected = ([table.clone().requires_grad_() for table in tables] for _ in range(2))
    value = info_nce_of_pairs(*found, 0.1, (rows, columns))
    (2 * value).backward()
    plain = torch.nn.functional.cross_entropy(
        expected[0][rows] @ expected[1][columns].T / 0.1, torch.arange(len(rows))
    )
    (2 * plain).backward()
    torch.testing.assert_close(value, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
