"""One modality's half of an encoder, as a stem, blocks and a head: what every family's view has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.tuning.hidden import Hidden

Part = nn.Module | nn.Parameter | None
"""Of a network; None for what a variant does not have."""


class Tower(ABC):
    """A differentiable view of an encoder: ``head(run(stem(x), 0, n_blocks))`` is its vectors.

    It owns nothing: parameters are the encoder's own, and a change of these shows in the next call. Any
    ``run(run(h, 0, m), m, n)`` is ``run(h, 0, n)``, gradients included, so that the lower states can be kept
    and the upper blocks run from them.

    Args:
        encoder: Whose tower.
        modality: Which tower: image or text.
        blocks: Its blocks, in the order they run; a block is a list of modules where families share some.
        widths: (n_blocks + 1) widths of `pooled`: before the first block and after each.
    """

    def __init__(
        self,
        encoder: Encoder,
        modality: Modality,
        blocks: Sequence[Sequence[Part]],
        widths: Sequence[int],
    ) -> None:
        self.encoder = encoder
        self.modality: Modality = modality
        self.widths = tuple(widths)
        self._blocks = [list(block) for block in blocks]

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    @abstractmethod
    def stem(self, inputs: Tensor) -> Hidden:
        """Pixels (B, 3, H, W) or tokens (B, L), as the encoder takes them -> the state before block 0."""

    @abstractmethod
    def _block(self, number: int, states: Tensor, context: Any) -> Tensor:
        """One block; ``context`` is what `_context` made of the batch."""

    @abstractmethod
    def head(self, hidden: Hidden) -> Tensor:
        """The state after the last block -> (B, D) float32, the encoder's vectors."""

    @abstractmethod
    def pooled(self, hidden: Hidden) -> Tensor:
        """The state after any block -> (B, W): of the token that becomes the vector, or the tokens' mean.

        No normalisation of the tower's is applied.
        """

    @abstractmethod
    def stem_parts(self) -> Sequence[Part]:
        """What runs before block 0."""

    @abstractmethod
    def head_parts(self) -> Sequence[Part]:
        """What runs after the last block: the final norm, pooling, projection."""

    def _context(self, hidden: Hidden) -> Any:  # noqa: ARG002 - towers with masks override it
        """What all blocks need beside the states, such as an attention mask; made once a `run`."""
        return None

    def run(self, hidden: Hidden, start: int = 0, stop: int | None = None) -> Hidden:
        """Blocks ``start`` to ``stop - 1``.

        Raises:
            ValueError: They are not among the tower's.
        """
        stop = self.n_blocks if stop is None else stop
        if not 0 <= start <= stop <= self.n_blocks:
            raise ValueError(f"blocks {start} to {stop} of a tower that has {self.n_blocks}.")
        if start == stop:
            return hidden
        context, states = self._context(hidden), hidden.states
        for number in range(start, stop):
            states = self._block(number, states, context)
        return hidden.with_states(states)

    def finish(self, hidden: Hidden, start: int = 0) -> Tensor:
        """``head(run(hidden, start))``: the state before block ``start`` -> (B, D) float32.

        Towers whose vector is made of one token spare the last block the others: it then costs their keys and
        values only, a fifth of the block.
        """
        return self.head(self.run(hidden, start))

    def vectors(self, inputs: Tensor) -> Tensor:
        """(B, D) float32 of the inputs, through all blocks."""
        return self.finish(self.stem(inputs))

    def pooled_states(self, inputs: Tensor) -> list[Tensor]:
        """(n_blocks + 1) times (B, W): `pooled` before block 0 and after each, as side adapters read them."""
        return self.pooled_run(self.stem(inputs))

    def pooled_run(self, hidden: Hidden, start: int = 0) -> list[Tensor]:
        """`pooled` of ``hidden``, the state before block ``start``, and after each block from there."""
        context, pooled = self._context(hidden), [self.pooled(hidden)]
        for number in range(start, self.n_blocks):
            hidden = hidden.with_states(self._block(number, hidden.states, context))
            pooled.append(self.pooled(hidden))
        return pooled

    def block_parts(self, number: int) -> Sequence[Part]:
        """Modules and parameters of one block, without other modalities' experts."""
        return self._blocks[number]

    def block_modules(self) -> list[nn.Module]:
        """The modules that run as blocks, whole: a checkpoint can be put around each."""
        return [part for block in self._blocks for part in block if isinstance(part, nn.Module)]

    def stem_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the encoder -> parameter, of the stem."""
        return named_parameters(self.encoder, self.stem_parts())

    def block_parameters(self, number: int) -> dict[str, nn.Parameter]:
        """Name in the encoder -> parameter, of one block."""
        return named_parameters(self.encoder, self.block_parts(number))

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the encoder -> parameter, of the head."""
        return named_parameters(self.encoder, self.head_parts())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in the encoder -> parameter, of the whole tower; other towers may share some."""
        found = self.stem_parameters()
        for number in range(self.n_blocks):
            found |= self.block_parameters(number)
        return found | self.head_parameters()


def named_parameters(encoder: nn.Module, parts: Sequence[Part]) -> dict[str, nn.Parameter]:
    """Parameters of some parts, under their names in the encoder, in the encoder's order."""
    wanted: set[int] = set()
    for part in parts:
        if isinstance(part, nn.Parameter):
            wanted.add(id(part))
        elif part is not None:
            wanted.update(map(id, part.parameters()))
    return {name: value for name, value in encoder.named_parameters() if id(value) in wanted}


def row_numbers(states: Tensor) -> Tensor:
    """(B,) 0, 1, 2, ... to pick one token of each row."""
    return torch.arange(len(states), device=states.device)
