"""Hidden states of a catalogue's items below some block, in files: an epoch then costs the upper blocks."""

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.errors import FeatureFileError
from features.live.row_files import RowReader, RowWriter
from features.tuning.hidden import Hidden

STATES_HEAD = "states.json"
_FORMAT = 2
_FILES = ("states.npy", "mask.npy", "at.npy")


class StateFile:
    """(R, L, W) states, (R, L) mask and (R,) position in a folder, read by item row.

    States are float16: they go into a frozen block's residual stream, whose numbers are far from its limits;
    `StateWriter` refuses those that are not.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `StateWriter` wrote.

        Raises:
            FeatureFileError: It is not there, not whole, or of another version.
        """
        self.rows = RowReader(folder, STATES_HEAD, _FILES)
        self._states, self._mask, self._at = self.rows.arrays
        head = self.rows.head
        if head.get("format") != _FORMAT or not isinstance(head.get("start"), int):
            raise FeatureFileError(
                f"{folder.name} holds states of {head}; expected format {_FORMAT} and the block above them; "
                "make them anew."
            )
        self.start: int = head["start"]
        """The first block that was not run."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Tensor, device: torch.device) -> Hidden:
        """(R,) item rows -> their states, float32 on a device; padding is not cut off.

        Raises:
            FeatureFileError: An item has no state here.
        """
        places = self.rows.places(rows)
        states = torch.from_numpy(np.asarray(self._states[places])).to(device).float()
        mask = torch.from_numpy(np.asarray(self._mask[places])).to(device)
        return Hidden(states, mask, torch.from_numpy(np.asarray(self._at[places])).to(device))

    def length(self, row: int) -> int:
        """Tokens of an item; 0 for maps, which are all of one size."""
        return int(self._lengths[row])

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        """(I,) tokens; asked for item by item in every step, so that they are counted once."""
        return self.rows.spread(self._mask.sum(axis=1, dtype=np.int64))


class StateWriter:
    """Writes the states of a catalogue, batch by batch, in any order.

    Args:
        folder: New, or of an earlier try.
        n_items: I.
        start: The first block that is not run.
        rows: The item rows that will come; None for all.
        resume: Keep what an earlier try of the same states has written.
    """

    def __init__(
        self, folder: Path, n_items: int, *, start: int, rows: Tensor | None = None, resume: bool = False
    ) -> None:
        self.rows = RowWriter(folder, STATES_HEAD, n_items, rows, resume=resume)
        self._start = start

    def write(self, rows: Tensor, hidden: Hidden) -> None:
        """Write (R,) rows; all are padded to the tokens of the first, which are the longest of the catalogue.

        Raises:
            FeatureFileError: A number is too large for float16, or is none.
        """
        width = self.rows.shape(_FILES[0])
        whole = hidden if hidden.is_map or not width else hidden.padded(width[0])
        states = whole.states.half()
        if not bool(torch.isfinite(states).all()):
            raise FeatureFileError(
                "a hidden state is beyond float16 (65,504), or NaN; set live.keep_states to false, or look "
                "at the encoder's weights."
            )
        self.rows.write(rows, dict(zip(_FILES, (states, whole.mask, whole.at), strict=True)))

    def finish(self) -> None:
        """Close the files; the head is written last, so that a folder without one is not whole."""
        self.rows.finish({"format": _FORMAT, "start": self._start})
