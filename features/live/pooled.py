"""What side networks read of a catalogue's items, in files: the frozen encoder runs once, and never again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from features.catalogue import Modality
from features.encoders.side import SideEncoder
from features.errors import FeatureFileError
from features.live.inputs import RowInputs

StateType = Literal["float16", "float32"]

_FORMAT = 1
_HEAD, _STATES, _VECTORS = "pooled.json", "states.npy", "vectors.npy"


class PooledFile:
    """(I, W) states of every block that is read, side by side, and (I, D) float32 vectors, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Open what `PooledWriter` wrote.

        Raises:
            FeatureFileError: It is not there, not whole, or of another version.
        """
        try:
            head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
            states, vectors = (np.load(folder / name, mmap_mode="r") for name in (_STATES, _VECTORS))
        except (OSError, ValueError) as error:
            raise FeatureFileError(
                f"{folder.name} holds no whole states ({error}); make them anew."
            ) from error
        widths = head.get("widths", []) if isinstance(head, dict) else []
        if head != {"format": _FORMAT, "widths": widths} or states.shape != (len(vectors), sum(widths)):
            raise FeatureFileError(
                f"{folder.name} holds states of {head}, of shape {states.shape}, and {len(vectors)} vectors; "
                f"expected format {_FORMAT}, the widths' sum and equal numbers; make them anew."
            )
        self._states, self._vectors = states, vectors
        self.widths: tuple[int, ...] = tuple(widths)

    def __len__(self) -> int:
        return len(self._states)

    def read(self, rows: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """(R,) item rows -> their states, (R, W) float32 each, and (R, D) vectors, on a device."""
        wanted = rows.cpu().numpy()
        states = torch.from_numpy(np.asarray(self._states[wanted])).to(device).float()
        vectors = torch.from_numpy(np.asarray(self._vectors[wanted])).to(device)
        return list(torch.split(states, list(self.widths), dim=1)), vectors


class PooledWriter:
    """Writes what `PooledFile` reads, batch by batch, in any order; rows never written stay zero.

    Args:
        folder: Empty, new, or of an earlier run, which is overwritten.
        n_items: I.
        state_type: Of the states; half the disk space, or all their digits.
    """

    def __init__(self, folder: Path, n_items: int, state_type: StateType = "float16") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEAD).unlink(missing_ok=True)
        self._folder, self._n_items = folder, n_items
        self._type = torch.float16 if state_type == "float16" else torch.float32
        self._open: dict[str, np.memmap[tuple[int, ...], np.dtype[np.generic]]] = {}
        self._widths: list[int] = []

    def write(self, rows: Tensor, states: Sequence[Tensor], vectors: Tensor) -> None:
        """Write (R,) rows.

        Raises:
            FeatureFileError: A number is too large for float16, or is none.
        """
        self._widths = [state.shape[1] for state in states]
        joined = torch.cat([state.float() for state in states], dim=1).to(self._type)
        if not bool(torch.isfinite(joined).all()) or not bool(torch.isfinite(vectors).all()):
            raise FeatureFileError(
                "a hidden state or a vector is NaN, or beyond float16 (65,504); set live.side_states to "
                "float32, or look at the encoder's weights."
            )
        for name, tensor in ((_STATES, joined), (_VECTORS, vectors.float())):
            values = tensor.cpu().numpy()
            if name not in self._open:
                self._open[name] = np.lib.format.open_memmap(
                    self._folder / name, "w+", dtype=values.dtype, shape=(self._n_items, values.shape[1])
                )
            self._open[name][rows.cpu().numpy()] = values

    def finish(self) -> PooledFile:
        """Close the files; the head is written last, so that a folder without one is not whole."""
        for kept in self._open.values():
            kept.flush()
        self._open = {}
        head = {"format": _FORMAT, "widths": self._widths}
        (self._folder / _HEAD).write_text(json.dumps(head) + "\n", encoding="utf-8")
        return PooledFile(self._folder)


@torch.inference_mode()
def keep_pooled(
    encoder: SideEncoder,
    modality: Modality,
    inputs: RowInputs,
    rows: Tensor,
    *,
    folder: Path,
    chunk: int,
    state_type: StateType = "float16",
    progress: Callable[[int, int], None] | None = None,
) -> PooledFile:
    """Run rows through the frozen encoder, and keep what its side network reads.

    Args:
        encoder: Whose inner encoder is run.
        modality: Which tower's.
        inputs: Of that modality.
        rows: (R,) item rows, on the CPU.
        folder: Where the files go.
        chunk: Rows at a time; those of like lengths are run together.
        state_type: Of the states in the file.
        progress: Called with rows done and rows in all.
    """
    device = next(encoder.parameters()).device
    lengths = np.array([inputs.length(int(row)) for row in rows], dtype=np.int64)
    order = torch.from_numpy(np.argsort(-lengths, kind="stable"))
    writer = PooledWriter(folder, len(inputs.contents), state_type)
    for first in range(0, len(rows), chunk):
        some = rows[order[first : first + chunk]]
        states, vectors = encoder.frozen(modality, inputs(some, device))
        writer.write(some, states, vectors)
        if progress is not None:
            progress(min(first + chunk, len(rows)), len(rows))
    return writer.finish()
