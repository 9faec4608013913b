"""The frozen part of an encoder, run once over a catalogue: what comes out is kept in files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.encoders.side import states_and_vectors
from features.errors import EncoderError
from features.live.inputs import RowInputs
from features.live.pooled import PooledWriter, StateType
from features.live.row_files import RowWriter
from features.live.states import StateWriter
from features.tuning.modes import TuningConfig
from features.tuning.side import states_read
from features.tuning.tower import Tower
from features.tuning.towers import tower_of

Progress = Callable[[int, int], None]
"""Called with items done and items in all."""


def blocks_above(tuning: TuningConfig, modality: Modality) -> int | None:
    """How many of a tower's blocks are run from kept states, by the settings alone: no encoder is loaded.

    None where nothing stays as it is. That low-rank updates may leave the lowest blocks out, by the names in
    ``lora_targets``, is seen at the encoder only, and does not count here.
    """
    if modality in tuning.frozen_towers:
        return 0
    return tuning.last_n if tuning.mode == "last-n" else None


def block_after(tower: Tower, above: int) -> int:
    """Return the first of a tower's ``above`` uppermost blocks.

    Raises:
        EncoderError: It has fewer.
    """
    if above > tower.n_blocks:
        raise EncoderError(
            f"last_n is {above}, but the {tower.modality} tower of {tower.encoder.info.spec!r} has "
            f"{tower.n_blocks} blocks; lower it, or choose mode `full`."
        )
    return tower.n_blocks - above


@torch.no_grad()
def keep_states(
    tower: Tower,
    inputs: RowInputs,
    rows: Tensor,
    start: int,
    *,
    folder: Path,
    chunk: int,
    progress: Progress | None = None,
    resume: bool = False,
) -> dict[int, str]:
    """Run rows through the stem and the blocks below ``start``, and keep the states for a `StateFile`.

    Args:
        tower: In evaluation below ``start``.
        inputs: Of its modality.
        rows: (R,) item rows, on the CPU.
        start: The first block that is not run.
        folder: Where the files go.
        chunk: Rows at a time; those of like lengths are run together.
        progress: Called with rows done and rows in all.
        resume: Go on from what an earlier try of the same has left in the folder.

    Returns:
        Item row -> why it could not be read; it has no state.
    """
    tower.encoder.eval()
    device = next(tower.encoder.parameters()).device
    writer = StateWriter(folder, len(inputs.contents), start=start, rows=rows, resume=resume)

    def run(some: Tensor, values: Tensor) -> None:
        writer.write(some, tower.run(tower.stem(values), 0, start))

    lost = _run(run, device, inputs, rows, written=writer.rows, chunk=chunk, progress=progress)
    writer.finish()
    return lost


@torch.inference_mode()
def keep_pooled(
    encoder: Encoder,
    inputs: RowInputs,
    rows: Tensor,
    *,
    every_nth: int,
    folder: Path,
    chunk: int,
    state_type: StateType = "float16",
    progress: Progress | None = None,
    resume: bool = False,
) -> dict[int, str]:
    """Run rows through a frozen encoder, and keep what its side network reads for a `PooledFile`.

    Args:
        encoder: The frozen one, without side networks.
        inputs: Of the modality whose tower is run.
        rows: (R,) item rows, on the CPU.
        every_nth: Blocks from one state that is read to the next.
        folder: Where the files go.
        chunk: Rows at a time; those of like lengths are run together.
        state_type: Of the states in the file.
        progress: Called with rows done and rows in all.
        resume: Go on from what an earlier try of the same has left in the folder.

    Returns:
        Item row -> why it could not be read; it has no state.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    tower = tower_of(encoder, inputs.modality)
    blocks = states_read(tower.n_blocks, every_nth)
    writer = PooledWriter(
        folder,
        len(inputs.contents),
        state_type,
        blocks=blocks,
        widths=[tower.widths[number] for number in blocks],
        rows=rows,
        resume=resume,
    )

    def run(some: Tensor, values: Tensor) -> None:
        writer.write(some, *states_and_vectors(tower, values, every_nth))

    lost = _run(run, device, inputs, rows, written=writer.rows, chunk=chunk, progress=progress)
    writer.finish()
    return lost


def _run(
    run: Callable[[Tensor, Tensor], None],
    device: torch.device,
    inputs: RowInputs,
    rows: Tensor,
    *,
    written: RowWriter,
    chunk: int,
    progress: Progress | None,
) -> dict[int, str]:
    """Have every row run that is not written yet, the longest first: they set the width of the file."""
    lengths = np.array([inputs.length(int(row)) for row in rows], dtype=np.int64)
    order = torch.from_numpy(np.argsort(-lengths, kind="stable"))
    lost: dict[int, str] = {}
    for first in range(0, len(rows), chunk):
        some = rows[order[first : first + chunk]]
        if not written.has(some):
            kept, values, reasons = inputs.readable(some, device)
            lost |= reasons
            if values is not None:
                run(kept, values)
        if progress is not None:
            progress(min(first + chunk, len(rows)), len(rows))
    return lost
