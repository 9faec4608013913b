"""What side networks read of a catalogue's items, in files: the frozen encoder runs once, and never again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from features.errors import FeatureFileError
from features.live.row_files import RowReader, RowWriter

StateType = Literal["float16", "float32"]

POOLED_HEAD = "pooled.json"
_FORMAT = 2
_STATES, _VECTORS = "states.npy", "vectors.npy"


class PooledFile:
    """(R, W) states of every block that is read, side by side, and (R, D) float32 vectors, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Open what `PooledWriter` wrote.

        Raises:
            FeatureFileError: It is not there, not whole, or of another version.
        """
        self.rows = RowReader(folder, POOLED_HEAD, (_STATES, _VECTORS))
        self._states, self._vectors = self.rows.arrays
        head = self.rows.head
        widths, blocks = (head.get(name, []) for name in ("widths", "blocks"))
        wanted = {"format": _FORMAT, "blocks": blocks, "widths": widths}
        if head != wanted or len(widths) != len(blocks) or self._states.shape[1:] != (sum(widths),):
            raise FeatureFileError(
                f"{folder.name} holds states of {head}, of shape {self._states.shape}; expected format "
                f"{_FORMAT}, and rows of the widths' sum; make them anew."
            )
        self.widths: tuple[int, ...] = tuple(widths)
        self.blocks: tuple[int, ...] = tuple(blocks)
        """After how many blocks each of the states is read."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """(R,) item rows -> their states, (R, W) float32 each, and (R, D) vectors, on a device.

        Raises:
            FeatureFileError: An item has no state here.
        """
        places = self.rows.places(rows)
        states = torch.from_numpy(np.asarray(self._states[places])).to(device).float()
        vectors = torch.from_numpy(np.asarray(self._vectors[places])).to(device)
        return list(torch.split(states, list(self.widths), dim=1)), vectors


class PooledWriter:
    """Writes what `PooledFile` reads, batch by batch, in any order.

    Args:
        folder: New, or of an earlier try.
        n_items: I.
        state_type: Of the states; half the disk space, or all their digits.
        blocks: After how many blocks each of the states is read.
        widths: Of these states.
        rows: The item rows that will come; None for all.
        resume: Keep what an earlier try of the same states has written.
    """

    def __init__(
        self,
        folder: Path,
        n_items: int,
        state_type: StateType = "float16",
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        rows: Tensor | None = None,
        resume: bool = False,
    ) -> None:
        self.rows = RowWriter(folder, POOLED_HEAD, n_items, rows, resume=resume)
        self._type = torch.float16 if state_type == "float16" else torch.float32
        self._head: dict[str, JsonValue] = {
            "format": _FORMAT,
            "blocks": list(blocks),
            "widths": list(widths),
        }

    def write(self, rows: Tensor, states: Sequence[Tensor], vectors: Tensor) -> None:
        """Write (R,) rows.

        Raises:
            FeatureFileError: A number is too large for float16, or is none.
        """
        joined = torch.cat([state.float() for state in states], dim=1).to(self._type)
        if not bool(torch.isfinite(joined).all()) or not bool(torch.isfinite(vectors).all()):
            raise FeatureFileError(
                "a hidden state or a vector is NaN, or beyond float16 (65,504); set live.side_states to "
                "float32, or look at the encoder's weights."
            )
        self.rows.write(rows, {_STATES: joined, _VECTORS: vectors.float()})

    def finish(self) -> None:
        """Close the files; the head is written last, so that a folder without one is not whole."""
        self.rows.finish(self._head)
