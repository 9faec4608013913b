from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders import losses
from recommenders.losses import bpr_loss, half_squared_norm, info_nce, pair_scores


def test_pair_scores_are_the_inner_products_of_each_row() -> None:
    users, items = torch.randn(4, 3), torch.randn(4, 2, 3)
    scores = pair_scores(users, items)
    assert scores.shape == (4, 2)
    for b in range(4):
        for k in range(2):
            assert scores[b, k].item() == pytest.approx(float(users[b] @ items[b, k]), rel=1e-5)


def test_bpr_is_the_mean_of_minus_log_sigmoid_of_the_differences() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.5, -1.0]])
    differences = [1.0 - 0.0, 1.0 - 2.0, 0.5 - 0.5, 0.5 + 1.0]
    expected = np.mean([-np.log(1 / (1 + np.exp(-x))) for x in differences])
    assert bpr_loss(scores).item() == pytest.approx(expected, rel=1e-6)


def test_bpr_stays_finite_where_the_model_is_badly_wrong() -> None:
    scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = bpr_loss(scores)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 1)])
def test_scores_without_a_negative_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1 \+ N\)"):
        bpr_loss(torch.zeros(shape))


def test_the_gradient_of_half_the_squared_norm_is_the_tensor_itself() -> None:
    first, second = torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    value = half_squared_norm(first, second)
    value.backward()
    squares = (first.detach() ** 2).sum() + (second.detach() ** 2).sum()
    torch.testing.assert_close(value.detach(), 0.5 * squares)
    torch.testing.assert_close(first.grad, first.detach())
    torch.testing.assert_close(second.grad, second.detach())


@pytest.mark.parametrize("length", [0.5, 30])  # products up to 60, whose exp is safe, and beyond
@pytest.mark.parametrize("block", [1, 3, 256])
def test_info_nce_is_the_cross_entropy_of_the_products_with_its_gradients(
    block: int, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK_ANCHORS", block)
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
