from __future__ import annotations

import pytest
import torch

from recommenders.dropout import dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_dropped_at_the_rate_and_the_others_scaled(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.ones(301, 1001, dtype=dtype)
    dropped = dropout(table, rate)
    assert dropped.dtype == dtype
    deviation = (rate * (1 - rate) / table.numel()) ** 0.5
    assert float((dropped == 0).double().mean()) == pytest.approx(rate, abs=5 * deviation + 2**-17)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-2, atol=0)
    for axis in (0, 1):  # nothing repeats along rows or columns
        assert float((dropped == 0).double().mean(dim=axis).std()) < 0.1
    torch.manual_seed(0)
    assert torch.equal(dropout(table, rate), dropped)
    assert not torch.equal(dropout(table, rate), dropped)


def test_the_gradient_is_what_the_numbers_were_multiplied_by() -> None:
    table = torch.randn(5, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dropped = dropout(table.requires_grad_(), 0.4)
    dropped.sum().backward()
    torch.testing.assert_close(dropped.detach(), table.detach() * table.grad)
    assert 0 < int((table.grad == 0).sum()) < table.numel()


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped_and_nothing_drawn_where_nothing_is_asked(rate: float, training: bool) -> None:
    table, state = torch.randn(4, 2), torch.get_rng_state()
    assert dropout(table, rate, training) is table
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_close_to_one_leave_finite_numbers() -> None:
    torch.manual_seed(0)
    assert dropout(torch.ones(1 << 18), 1 - 1e-9).isfinite().all()


def test_an_empty_table_stays_empty() -> None:
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
