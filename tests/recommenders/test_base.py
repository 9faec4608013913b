from __future__ import annotations

import pytest
import torch

from recommenders.models.base import rows_minus_first

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
