"""From an encoder, a catalogue and a mode to rows that can be encoded while a recommender trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from features.catalogue import Catalogue, Modality, TextConfig
from features.errors import FeatureError
from features.images import ImageLimits
from features.live.encoder import CatalogueEncoder
from features.live.inputs import RowInputs
from features.live.pooled import StateType, keep_pooled
from features.live.sources import SideStates, UpperBlocks, VectorSource, WholeEncoder
from features.live.states import StateFile, StateWriter
from features.tuning.modes import Tuned
from features.tuning.side_mode import SideTuned
from features.tuning.towers import Tower, tower_of

Progress = Callable[[int, int], None]
"""Called with items done and items in all."""
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LiveConfig(BaseModel, frozen=True, extra="forbid"):
    """How a catalogue's items are encoded while a recommender trains."""

    chunk: PositiveInt = Field(64, description="Items encoded at a time; this sets the memory of a step.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision; weights and their updates stay float32."
    )
    keep_states: bool = Field(
        True, description="Whether states below the lowest trained block are computed once and kept on disk."
    )
    side_states: StateType = Field(
        "float16", description="Numbers in which a frozen encoder's states are kept for its side networks."
    )
    pixel_cache_mb: NonNegativeInt = Field(
        16_384, description="Most disk space for decoded pictures; with too little each is decoded each time."
    )
    limits: ImageLimits = Field(ImageLimits(), description="Larger pictures count as unreadable.")
    n_workers: NonNegativeInt = Field(0, description="Threads that decode pictures; 0: two.")


@contextmanager
def live_encoder(
    tuned: Tuned | SideTuned,
    catalogue: Catalogue,
    modalities: Sequence[Modality],
    present: Mapping[str, Tensor],
    config: LiveConfig,
    *,
    folder: Path,
    text: TextConfig | None = None,
    progress: Progress | None = None,
) -> Iterator[CatalogueEncoder]:
    """Give the catalogue's rows as something to encode; what is kept on disk is removed at the end.

    Args:
        tuned: An encoder that knows what of it is trained. With side networks the frozen encoder runs once.
        catalogue: All items.
        modalities: Which are to be live: image, text or both.
        present: Modality -> (I,) bool, the rows that may be asked for.
        config: How.
        folder: Where decoded pictures and states are kept meanwhile.
        text: Which text of an item.
        progress: Told of states that are computed.

    Raises:
        FeatureError: A modality that is neither image nor text, or pictures that cannot be read any more.
    """
    device = next(tuned.encoder.parameters()).device
    open_inputs: list[RowInputs] = []
    sources: dict[str, VectorSource] = {}
    try:
        for modality in modalities:
            if modality == "fused":
                raise FeatureError(
                    "fused vectors cannot be live, image and text can; let the recommender read these two."
                )
            side = tuned.encoder.side(modality) if isinstance(tuned, SideTuned) else None
            runs_once = side is not None and config.keep_states
            inputs = RowInputs(
                catalogue,
                tuned.encoder,
                modality,
                text or TextConfig(),
                cache_file=folder / f"pixels-{modality}.f16",
                cache_mb=0 if runs_once else config.pixel_cache_mb,
                limits=config.limits,
                n_workers=config.n_workers,
            )
            open_inputs.append(inputs)
            rows = present[modality].nonzero().squeeze(1).cpu()
            start = _kept_blocks(tuned, modality) if config.keep_states and isinstance(tuned, Tuned) else 0
            if isinstance(tuned, SideTuned) and side is not None and runs_once:
                kept = keep_pooled(
                    tuned.encoder,
                    modality,
                    inputs,
                    rows,
                    folder=folder / f"states-{modality}",
                    chunk=config.chunk,
                    state_type=config.side_states,
                    progress=progress,
                )
                sources[modality] = SideStates(side, kept, device)
            elif start:
                tower = tower_of(tuned.encoder, modality)
                states = keep_states(
                    tower,
                    inputs,
                    rows,
                    start,
                    folder=folder / f"states-{modality}",
                    chunk=config.chunk,
                    progress=progress,
                )
                sources[modality] = UpperBlocks(tower, states, start, device)
            else:
                sources[modality] = WholeEncoder(tuned.encoder, modality, inputs, device)
        yield CatalogueEncoder(
            tuned, sources, chunk=config.chunk, device=device, autocast=_AUTOCAST[config.precision]
        )
    finally:
        for inputs in open_inputs:
            inputs.close()


def _kept_blocks(tuned: Tuned, modality: Modality) -> int:
    """Blocks whose result can be kept; 0 where the stem is trained or the encoder shows no blocks."""
    trained_everywhere = all(value.requires_grad for value in tuned.encoder.parameters())
    return 0 if trained_everywhere else tuned.frozen_blocks(modality) or 0


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
) -> StateFile:
    """Run rows through the stem and the blocks below ``start``, and keep the states.

    Args:
        tower: In evaluation below ``start``.
        inputs: Of its modality.
        rows: (R,) item rows.
        start: The first block that is not run.
        folder: Where the files go.
        chunk: Rows at a time.
        progress: Called with rows done.
    """
    device = next(tower.encoder.parameters()).device
    tower.encoder.eval()
    lengths: NDArray[np.int64] = np.array([inputs.length(int(row)) for row in rows], dtype=np.int64)
    order = torch.from_numpy(np.argsort(-lengths, kind="stable"))  # the longest first: it sets the width
    writer = StateWriter(folder, len(inputs.contents))
    longest = 0
    for first in range(0, len(rows), chunk):
        some = rows[order[first : first + chunk]]
        hidden = tower.run(tower.stem(inputs(some, device)), 0, start)
        longest = longest or hidden.states.shape[1]
        writer.write(some, hidden, longest)
        if progress is not None:
            progress(min(first + chunk, len(rows)), len(rows))
    return writer.finish()
