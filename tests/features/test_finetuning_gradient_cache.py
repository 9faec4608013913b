"""Chunks give the whole batch's gradient, dropout included, and leave torch's generators alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from features.contrastive import contrastive_loss
from features.gradient_cache import backward_through, chunked_forward

CPU = torch.device("cpu")


def tower(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 5))


def inputs() -> tuple[Tensor, Tensor]:
    pictures, texts = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(0))
    return pictures, texts


def passes(model: nn.Module, rows: Tensor, size: int) -> list[Callable[[], Tensor]]:
    def encode(chunk: Tensor) -> Callable[[], Tensor]:
        return lambda: model(chunk)

    return [encode(chunk) for chunk in rows.split(size)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def cached_gradients(model: nn.Module, size: int) -> tuple[float, Tensor, dict[str, Tensor]]:
    scale = nn.Parameter(torch.tensor(1.5))
    chunks = [chunked_forward(passes(model, rows, size), CPU) for rows in inputs()]
    loss = contrastive_loss(chunks[0].outputs, chunks[1].outputs, scale)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())  # nothing has passed yet
    for chunk in chunks:
        backward_through(chunk)
    return loss.item(), scale.grad, gradients(model)  # type: ignore[return-value]


def test_chunks_give_every_parameter_the_gradient_of_the_whole_batch() -> None:
    plain, scale = tower(), nn.Parameter(torch.tensor(1.5))
    images, texts = inputs()
    expected = contrastive_loss(plain(images), plain(texts), scale)
    expected.backward()
    for size in (1, 4, 11):
        loss, scale_gradient, found = cached_gradients(tower(), size)
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(scale_gradient, scale.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, gradients(plain), atol=1e-5, rtol=1e-5)


def test_the_second_run_of_a_chunk_drops_what_the_first_dropped() -> None:
    """The reference holds the graphs of all chunks at once and draws the same numbers."""
    kept, scale = tower(dropout=0.5), nn.Parameter(torch.tensor(1.5))
    torch.manual_seed(7)
    images, texts = (torch.cat([run() for run in passes(kept, rows, 4)]) for rows in inputs())
    drawn = torch.rand(3)
    contrastive_loss(images, texts, scale).backward()

    cached = tower(dropout=0.5)
    torch.manual_seed(7)
    _, scale_gradient, found = cached_gradients(cached, 4)
    assert torch.equal(torch.rand(3), drawn)  # the replay took nothing out of the generator
    torch.testing.assert_close(scale_gradient, scale.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, gradients(kept), atol=1e-6, rtol=1e-5)

    torch.manual_seed(8)  # other masks give other gradients, so that the above says something
    _, _, others = cached_gradients(tower(dropout=0.5), 4)
    assert not torch.allclose(others["0.weight"], found["0.weight"], atol=1e-3)


def test_a_gradient_of_the_wrong_shape_is_refused_and_none_does_nothing() -> None:
    model = tower()
    chunks = chunked_forward(passes(model, inputs()[0], 4), CPU)
    backward_through(chunks)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"shape \(11, 4\); expected \(11, 5\)"):
        backward_through(chunks, torch.ones(11, 4))
    with pytest.raises(ValueError, match="no chunk"):
        chunked_forward([], CPU)


def test_all_chunks_but_the_last_run_in_the_context_that_is_given() -> None:
    model, entered, during = tower(), [], []

    @contextmanager
    def waiting() -> Iterator[None]:
        entered.append(True)
        yield
        entered.append(False)

    chunks = chunked_forward(passes(model, inputs()[0], 4), CPU)
    model.register_forward_hook(lambda *_: during.append(bool(entered and entered[-1])))
    backward_through(chunks, torch.ones(11, 5), before_last=waiting)
    assert during == [True, True, False]


def test_frozen_parameters_get_no_gradient() -> None:
    model = tower().requires_grad_(requires_grad=False)
    chunks = chunked_forward(passes(model, inputs()[0], 4), CPU)
    backward_through(chunks, torch.ones(11, 5))
    assert all(parameter.grad is None for parameter in model.parameters())
