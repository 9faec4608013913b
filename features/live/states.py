"""Hidden states of a catalogue's items below some block, in files: an epoch then costs the upper blocks."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.errors import FeatureFileError
from features.tuning.hidden import Hidden

_FORMAT = 1
_HEAD = "states.json"
_FILES = ("states.npy", "mask.npy", "at.npy")


class StateFile:
    """(I, L, W) states, (I, L) mask and (I,) position in a folder, read row by row.

    States are float16: they go into a frozen block's residual stream, whose numbers are far from its limits;
    `write` refuses those that are not.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `StateWriter` wrote.

        Raises:
            FeatureFileError: It is not there, not whole, or of another version.
        """
        try:
            head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
            states, mask, at = (np.load(folder / name, mmap_mode="r") for name in _FILES)
        except (OSError, ValueError) as error:
            raise FeatureFileError(
                f"{folder.name} holds no whole states ({error}); make them anew."
            ) from error
        if head != {"format": _FORMAT} or not len(states) == len(mask) == len(at):
            raise FeatureFileError(
                f"{folder.name} holds states of format {head} with {len(states)}, {len(mask)} and {len(at)} "
                f"rows; expected format {_FORMAT} and equal numbers; make them anew."
            )
        self._states, self._mask, self._at = states, mask, at

    def __len__(self) -> int:
        return len(self._states)

    def read(self, rows: Tensor, device: torch.device) -> Hidden:
        """(R,) item rows -> their states, float32 on a device; padding is not cut off."""
        wanted = rows.cpu().numpy()
        states = torch.from_numpy(np.asarray(self._states[wanted])).to(device).float()
        mask = torch.from_numpy(np.asarray(self._mask[wanted])).to(device)
        return Hidden(states, mask, torch.from_numpy(np.asarray(self._at[wanted])).to(device))

    def length(self, row: int) -> int:
        """Tokens of an item; 0 for maps, which are all of one size."""
        return int(self._mask[row].sum()) if self._mask.shape[1] else 0


class StateWriter:
    """Writes the states of a catalogue, batch by batch, in any order; rows never written stay zero.

    Args:
        folder: Empty, new, or of an earlier run, which is overwritten.
        n_items: I.
    """

    def __init__(self, folder: Path, n_items: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEAD).unlink(missing_ok=True)
        self.folder, self.n_items = folder, n_items
        self._open: list[np.memmap[tuple[int, ...], np.dtype[np.generic]]] = []

    def write(self, rows: Tensor, hidden: Hidden, length: int) -> None:
        """Write (R,) rows; all are padded to ``length`` tokens, the longest of the catalogue.

        Raises:
            FeatureFileError: A number is too large for float16, or is none.
        """
        whole = hidden if hidden.is_map else hidden.padded(length)
        states = whole.states.half()
        if not bool(torch.isfinite(states).all()):
            raise FeatureFileError(
                "a hidden state is beyond float16 (65,504), or NaN; keep no states: choose mode lora or full."
            )
        tensors = (states, whole.mask, whole.at)
        if not self._open:
            for name, tensor in zip(_FILES, tensors, strict=True):
                values = tensor.cpu().numpy()
                self._open.append(
                    np.lib.format.open_memmap(
                        self.folder / name, "w+", dtype=values.dtype, shape=(self.n_items, *values.shape[1:])
                    )
                )
        for kept, tensor in zip(self._open, tensors, strict=True):
            kept[rows.cpu().numpy()] = tensor.cpu().numpy()

    def finish(self) -> StateFile:
        """Close the files; the head is written last, so that a folder without one is not whole."""
        for kept in self._open:
            kept.flush()
        self._open = []
        (self.folder / _HEAD).write_text(json.dumps({"format": _FORMAT}) + "\n", encoding="utf-8")
        return StateFile(self.folder)
