"""From item rows to vectors with gradient: through a whole encoder, its upper blocks, or side adapters."""

from typing import Protocol

import torch
from torch import Tensor

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.live.inputs import RowInputs
from features.live.pooled import PooledFile
from features.live.states import StateFile
from features.tuning.side import SideTower
from features.tuning.towers import Tower, has_tower, tower_of


class VectorSource(Protocol):
    """One modality's vectors of any items."""

    def vectors(self, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32, with the graph to what is trained."""
        ...

    def length(self, row: int) -> int:
        """How long an item's input is, for chunks of like lengths; 0 where all are equal."""
        ...

    def first(self) -> int:
        """An item row that can be asked for, as not every item has every modality."""
        ...


class WholeEncoder:
    """Through all of an encoder."""

    def __init__(self, encoder: Encoder, modality: Modality, inputs: RowInputs, device: torch.device) -> None:
        encode = encoder.encode_images if modality == "image" else encoder.encode_texts
        # A tower computes the same, and may spare its last block what no vector is made of.
        self._encode = tower_of(encoder, modality).vectors if has_tower(encoder, modality) else encode
        self._inputs, self._device = inputs, device

    def vectors(self, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32."""
        return self._encode(self._inputs(rows, self._device))

    def length(self, row: int) -> int:
        """Tokens of a text."""
        return self._inputs.length(row)

    def first(self) -> int:
        """An item row that has the modality."""
        return self._inputs.first()


class UpperBlocks:
    """Through the blocks above kept states: what lies below is frozen and was run once."""

    def __init__(self, tower: Tower, states: StateFile, device: torch.device) -> None:
        self._tower, self._states, self._device = tower, states, device

    def vectors(self, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32."""
        hidden = self._states.read(rows, self._device).trimmed()
        return self._tower.finish(hidden, self._states.start)

    def length(self, row: int) -> int:
        """Tokens of a text."""
        return self._states.length(row)

    def first(self) -> int:
        """An item row that has a state."""
        return self._states.rows.first()


class SideStates:
    """Through a side network alone, from kept states and vectors of the frozen encoder."""

    def __init__(self, side: SideTower, kept: PooledFile, device: torch.device) -> None:
        self._side, self._kept, self._device = side, kept, device

    def vectors(self, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32."""
        vectors: Tensor = self._side(*self._kept.read(rows, self._device))
        return vectors

    def length(self, row: int) -> int:  # noqa: ARG002 - all inputs are of one size
        """0."""
        return 0

    def first(self) -> int:
        """An item row that has a state."""
        return self._kept.rows.first()
