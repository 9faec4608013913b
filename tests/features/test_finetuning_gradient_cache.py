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


def cached_gradients(
    model: nn.Module, size: int, *, room: int = 0
) -> tuple[float, Tensor, dict[str, Tensor]]:
    scale = nn.Parameter(torch.tensor(1.5))
    weights = list(model.parameters())
    chunks = [
        chunked_forward(passes(model, rows, size), CPU, room=room, weights=weights) for rows in inputs()
    ]
    assert all(each.kept_bytes <= room for each in chunks)
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


def linear_bytes(rows: int) -> int:
    """What the backward pass of two layers and a ReLU between needs: their inputs."""
    return 4 * rows * (6 + 8)


@pytest.mark.parametrize(
    ("room", "n_kept"), [(0, 0), (1, 0), (linear_bytes(4), 1), (linear_bytes(8), 2), (linear_bytes(12), 3)]
)
def test_chunks_that_fit_the_room_are_kept_and_run_once(room: int, n_kept: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False))
    ran: list[int] = []
    model.register_forward_hook(lambda *_: ran.append(1))
    chunks = chunked_forward(passes(model, inputs()[0], 4), CPU, room=room, weights=list(model.parameters()))
    assert len(ran) == 3
    assert chunks.kept_bytes == linear_bytes([0, 4, 8, 11][n_kept])
    assert [live is not None for live in chunks.live] == [number < n_kept for number in range(3)]
    backward_through(chunks, torch.ones(11, 5))
    assert len(ran) == 3 + 3 - n_kept


def test_what_is_kept_changes_no_bit_of_a_gradient() -> None:
    found = []
    for room in (0, 1_500, 3_000, 10**6):
        torch.manual_seed(7)
        found.append((*cached_gradients(tower(dropout=0.5), 4, room=room), torch.rand(3)))
    for loss, scale, others, drawn in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(scale, found[0][1])
        assert all(torch.equal(value, found[0][2][name]) for name, value in others.items())
        assert torch.equal(drawn, found[0][3])


def test_a_frozen_tower_keeps_nothing_though_there_is_room() -> None:
    model = tower().requires_grad_(requires_grad=False)
    chunks = chunked_forward(passes(model, inputs()[0], 4), CPU, room=10**6)
    assert chunks.kept_bytes == 0
    assert chunks.live == (None, None, None)


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
