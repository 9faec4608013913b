from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from recommenders.models.base import rows_minus_first, unit_rows

ROWS = torch.tensor([[0, 3, 1], [2, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_minus_first_subtracts_the_first_row_from_the_others(dtype: torch.dtype) -> None:
    table = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rows_minus_first(table, ROWS)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    wide = table.double()
    expected = torch.stack([wide[3] - wide[0], wide[1] - wide[0], wide[2] - wide[2], wide[4] - wide[2]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_rows_minus_first_reach_both_rows() -> None:
    table = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(rows_minus_first, (table.requires_grad_(), ROWS))


def test_unit_rows_and_their_gradients_are_those_of_normalize() -> None:
    table = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table[2] = 0
    found, expected = (table.clone().requires_grad_() for _ in range(2))
    weights = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unit, right = unit_rows(found), normalize(expected, dim=1)
    torch.testing.assert_close(unit, right)
    (unit * weights).sum().backward()
    (right * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
