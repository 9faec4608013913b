"""Large contrastive batches in the memory of small ones: outputs first, gradients chunk by chunk.

A loss over all pairs of a batch needs every output at once, but not every activation: the outputs are
computed chunk by chunk without a graph, the loss gives the gradient of each output, and each chunk is then
run again, now with its graph, to take its share of that gradient to the parameters. The result is the whole
batch's gradient; the price is a second forward pass, of the chunks whose activations do not fit the memory
that may be spent on them.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, sec. 3.2
(arXiv 2101.06983).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Pass = Callable[[], Tensor]
"""Encodes one chunk anew each time it is called: -> (n, D). Equal random states give equal outputs.

Automatic mixed precision is entered inside: its casts of the weights are kept until it is left, and those of
the first run know no gradient."""


@dataclass(frozen=True)
class RandomState:
    """Where torch's global generators were."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The states that the next draw on ``device``, or on the CPU, starts from."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        """Have the next draws be those that followed."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@dataclass(frozen=True, eq=False)
class Chunked:
    """The outputs of all chunks, and what is needed to run each again."""

    outputs: Tensor
    """(N, D), a leaf that collects a gradient; rows are in the order of the chunks."""
    passes: tuple[Pass, ...]
    sizes: tuple[int, ...]
    """Rows of each chunk."""
    states: tuple[RandomState, ...]
    live: tuple[Tensor | None, ...]
    """The outputs of each chunk with their graph, of those that need not be run twice."""
    kept_bytes: int
    """What these graphs hold; 0 for a single chunk, which is not counted."""


def chunked_forward(
    passes: Sequence[Pass], device: torch.device, *, room: int = 0, weights: Iterable[Tensor] = ()
) -> Chunked:
    """Run all chunks; keep the activations of the first that fit. A single chunk keeps its own in any case.

    Args:
        passes: A pass for each chunk. What it depends on (weights, inputs, training mode) must not change
            before `backward_through`.
        device: Where the passes draw their random numbers (dropout), beside the CPU.
        room: Bytes of activations that may be kept until `backward_through`.
        weights: What the passes share and there is anyway, which is not counted.

    Raises:
        ValueError: There are no passes.
    """
    if not passes:
        raise ValueError("there is no chunk to encode.")
    if len(passes) == 1:
        live = passes[0]()
        leaf = live.detach().requires_grad_()
        return Chunked(leaf, tuple(passes), (len(live),), (), (live,), 0)
    states, outputs = [], []
    kept: list[Tensor | None] = []
    held, expected = 0, 1  # a chunk is expected to hold what the one before it did
    activations = _Activations(weights)
    for run in passes:
        states.append(RandomState.now(device))
        with torch.set_grad_enabled(held + expected <= room), activations.counted():
            output = run()
        fits = output.requires_grad and held + activations.n_bytes <= room
        held += activations.n_bytes if fits else 0
        expected = activations.n_bytes if fits else room + 1  # nor is a later one tried
        kept.append(output if fits else None)
        outputs.append(output.detach())
        del output  # and its graph, before the next one is made
    leaf = torch.cat(outputs).requires_grad_()
    return Chunked(leaf, tuple(passes), tuple(map(len, outputs)), tuple(states), tuple(kept), held)


class _Activations:
    """Counts what a graph keeps for its backward pass, each piece of memory once."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._storages: dict[int, int] = {}
        self._views: dict[int, dict[tuple[int, int], int]] = {}

    @property
    def n_bytes(self) -> int:
        """Of the last ``counted``. A chunk may be a part of a batch's memory: only what is seen counts."""
        return sum(min(self._storages[at], sum(views.values())) for at, views in self._views.items())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Look at the graphs made inside."""
        self._storages, self._views = {}, defaultdict(dict)

        def count(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            at = storage.data_ptr()
            if at not in self._weights:
                self._storages[at] = storage.nbytes()
                self._views[at][saved.data_ptr(), saved.numel()] = saved.numel() * saved.element_size()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            yield


def backward_through(
    chunked: Chunked,
    gradient: Tensor | None = None,
    *,
    before_last: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Take the gradient of the outputs to the parameters, where it is added to what they have.

    Each chunk draws the same random numbers as in its first run; afterwards torch's generators are where they
    were before the call.

    Args:
        chunked: Of `chunked_forward`.
        gradient: (N, D); left out, what `outputs.grad` has collected. Nothing happens where that is None.
        before_last: Context in which all chunks but the last run: a distributed model's ``no_sync``, so that
            its processes exchange gradients once.

    Raises:
        ValueError: The gradient has another shape than the outputs.
    """
    gradient = chunked.outputs.grad if gradient is None else gradient
    if gradient is None:
        return
    if gradient.shape != chunked.outputs.shape:
        raise ValueError(
            f"the gradient has shape {tuple(gradient.shape)}; expected {tuple(chunked.outputs.shape)}, as "
            "the outputs have."
        )
    if len(chunked.passes) == 1:
        assert chunked.live[0] is not None  # noqa: S101 - as chunked_forward keeps it
        _backward(chunked.live[0], gradient)
        return
    afterwards = RandomState.now(chunked.states[0].device)
    shares = torch.split(gradient, list(chunked.sizes))
    last = len(shares) - 1
    try:
        for number, (run, share, state, live) in enumerate(
            zip(chunked.passes, shares, chunked.states, chunked.live, strict=True)
        ):
            state.restore()
            with nullcontext() if number == last else before_last(), torch.enable_grad():
                _backward(run() if live is None else live, share)
    finally:
        afterwards.restore()


def _backward(outputs: Tensor, gradient: Tensor) -> None:
    if outputs.requires_grad:  # a frozen tower has nothing to take it to
        outputs.backward(gradient)  # type: ignore[no-untyped-call] # torch's own signature lacks types
