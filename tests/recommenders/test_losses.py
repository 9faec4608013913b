from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.losses import (
    LossConfig,
    bce_loss,
    bpr_loss,
    directau_loss,
    half_squared_norm,
    in_batch_softmax_loss,
    loss_of_pairs,
    pair_scores,
    reads_negatives,
    softmax_loss,
)
from recommenders.sampling import InBatch
from tests.references.plain_losses import plain_bce, plain_directau, plain_in_batch_softmax, plain_softmax


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


def assert_loss_and_gradients_match(loss, plain, *inputs: torch.Tensor) -> None:
    """Compare with the plain loop in float64; its gradients are central differences."""
    learnt = [values.clone().requires_grad_() for values in inputs]
    value = loss(*learnt)
    value.backward()
    arrays = [values.detach().numpy().copy() for values in inputs]
    assert value.item() == pytest.approx(plain(*arrays), rel=1e-6)
    for number, array in enumerate(arrays):
        grad = learnt[number].grad
        assert grad is not None
        for place in np.ndindex(array.shape):
            kept = array[place]
            ends = []
            for step in (1e-5, -1e-5):
                array[place] = kept + step
                ends.append(plain(*arrays))
            array[place] = kept
            expected = (ends[0] - ends[1]) / 2e-5
            assert float(grad[place]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bce_is_the_plain_loop() -> None:
    assert_loss_and_gradients_match(bce_loss, plain_bce, random_rows(5, 4))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_softmax_is_the_plain_loop(temperature: float) -> None:
    assert_loss_and_gradients_match(
        lambda scores: softmax_loss(scores, temperature),
        lambda scores: plain_softmax(scores, temperature),
        random_rows(5, 4),
    )


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_softmax_within_a_batch_is_the_plain_loop(temperature: float) -> None:
    log_q = random_rows(5, seed=3).abs().neg()
    taken = torch.eye(5, dtype=torch.bool)
    taken[0, 3] = taken[4, 1] = taken[4, 2] = True
    assert_loss_and_gradients_match(
        lambda users, items: in_batch_softmax_loss(users, items, temperature, log_q=log_q, taken=taken),
        lambda users, items: plain_in_batch_softmax(users, items, temperature, log_q.numpy(), taken.numpy()),
        random_rows(5, 3),
        random_rows(5, 3, seed=1),
    )


def test_directau_is_the_plain_loop() -> None:
    assert_loss_and_gradients_match(
        lambda users, items: directau_loss(users, items, 0.7),
        lambda users, items: plain_directau(users, items, 0.7),
        random_rows(5, 3),
        random_rows(5, 3, seed=1),
    )


def test_directau_of_equal_rows_and_of_one_row_is_finite() -> None:
    equal = torch.ones(4, 3, requires_grad=True)
    loss = directau_loss(equal, equal * 2, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)  # aligned, and not at all spread out
    assert equal.grad is not None
    assert equal.grad.isfinite().all()
    users, items = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert directau_loss(users, items, 5.0).item() == pytest.approx(2.0)


@pytest.mark.parametrize("loss", [bce_loss, lambda scores: softmax_loss(scores, 1.0)])
def test_losses_that_need_negatives_refuse_scores_without(loss) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1 \+ N\)"):
        loss(torch.zeros(4, 1))


def test_losses_stay_finite_where_the_model_is_badly_wrong() -> None:
    for loss in (bce_loss, lambda scores: softmax_loss(scores, 1.0)):
        scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
        loss(scores).backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


def test_settings_name_the_loss() -> None:
    scores, users, items = random_rows(5, 4), random_rows(5, 3), random_rows(5, 3, seed=1)
    known = InBatch(torch.zeros(5), torch.eye(5, dtype=torch.bool))

    def found(loss: str, in_batch: InBatch | None = None) -> float:
        config = LossConfig.model_validate({"loss": loss, "temperature": 0.3, "uniformity_weight": 0.4})
        return float(loss_of_pairs(config, scores, users, items, in_batch))

    assert found("bpr") == float(bpr_loss(scores))
    assert found("bce") == float(bce_loss(scores))
    assert found("softmax") == float(softmax_loss(scores, 0.3))
    within = in_batch_softmax_loss(users, items, 0.3, log_q=known.log_q, taken=known.taken)
    assert found("softmax", known) == float(within)
    assert found("directau") == float(directau_loss(users, items, 0.4))
    assert found("bpr", known) == float(bpr_loss(scores))
    reading = {loss: [reads_negatives(LossConfig(loss=loss), b) for b in (None, known)] for loss in LOSSES}
    assert reading == {
        "bpr": [True, True],
        "bce": [True, True],
        "softmax": [True, False],
        "directau": [False, False],
    }


LOSSES = ("bpr", "bce", "softmax", "directau")
