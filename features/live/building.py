"""From an encoder, a catalogue and a mode to rows that can be encoded while a recommender trains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from features.catalogue import Catalogue, Modality, TextConfig
from features.errors import FeatureError
from features.images import ImageLimits
from features.live.encoder import CatalogueEncoder
from features.live.inputs import RowInputs
from features.live.keeping import Progress, keep_pooled, keep_states
from features.live.kept import Kept, kept_source
from features.live.pooled import PooledFile, StateType
from features.live.sources import VectorSource, WholeEncoder
from features.live.states import StateFile
from features.tuning.modes import Tuned
from features.tuning.side_mode import SideTuned
from features.tuning.towers import tower_of

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LiveConfig(BaseModel, frozen=True, extra="forbid"):
    """How a catalogue's items are encoded while a recommender trains."""

    chunk: PositiveInt = Field(64, description="Items encoded at a time; this sets the memory of a step.")
    activations_mb: NonNegativeInt = Field(
        2_048,
        description="MiB of activations that may be kept; chunks that do not fit are run twice, as all are "
        "with tuning.gradient_checkpointing.",
    )
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
    states: Mapping[str, Kept] | None = None,
    progress: Progress | None = None,
) -> Iterator[CatalogueEncoder]:
    """Give the catalogue's rows as something to encode; decoded pictures are removed at the end.

    Args:
        tuned: An encoder that knows what of it is trained. With side networks the frozen encoder runs once.
        catalogue: All items.
        modalities: Which are to be live: image, text or both.
        present: Modality -> (I,) bool, the rows that may be asked for.
        config: How.
        folder: Where decoded pictures are kept meanwhile, and states that are computed here.
        text: Which text of an item.
        states: Modality -> what the frozen part makes of this catalogue, kept before; where there is none it
            is computed here, as ``config`` says.
        progress: Told of states that are computed.

    Raises:
        FeatureError: A modality that is neither image nor text, pictures that cannot be read any more, or
            states that are another encoder's, another catalogue's, or lack rows.
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
            kept = (states or {}).get(modality)
            if kept is None:
                frozen = _frozen_part(tuned, modality) if config.keep_states else None
                inputs = RowInputs(
                    catalogue,
                    tuned.encoder,
                    modality,
                    text or TextConfig(),
                    cache_file=folder / f"pixels-{modality}.f16",
                    # What runs once is decoded once.
                    cache_mb=config.pixel_cache_mb if frozen is None else 0,
                    limits=config.limits,
                    n_workers=config.n_workers,
                )
                open_inputs.append(inputs)
                if frozen is None:
                    sources[modality] = WholeEncoder(tuned.encoder, modality, inputs, device)
                    continue
                rows = present[modality].nonzero().squeeze(1).cpu()
                into = folder / f"states-{modality}"
                kept = _compute(tuned, inputs, rows, frozen, config=config, folder=into, progress=progress)
            sources[modality] = kept_source(
                tuned, modality, kept, catalogue=catalogue, present=present[modality], device=device
            )
        yield CatalogueEncoder(
            tuned,
            sources,
            chunk=config.chunk,
            room=0 if tuned.recomputes else config.activations_mb * 2**20,
            device=device,
            autocast=_AUTOCAST[config.precision],
        )
    finally:
        for inputs in open_inputs:
            inputs.close()


def _frozen_part(tuned: Tuned | SideTuned, modality: Modality) -> int | None:
    """Blocks that run once; None where the stem is trained, or the encoder shows no blocks that could."""
    if isinstance(tuned, SideTuned):
        return tuned.frozen_blocks(modality) if tuned.encoder.side(modality) else None
    trained_everywhere = all(value.requires_grad for value in tuned.encoder.parameters())
    # Nothing but a stem is hardly worth its space.
    return None if trained_everywhere else tuned.frozen_blocks(modality) or None


def _compute(
    tuned: Tuned | SideTuned,
    inputs: RowInputs,
    rows: Tensor,
    frozen_blocks: int,
    *,
    config: LiveConfig,
    folder: Path,
    progress: Progress | None,
) -> Kept:
    """Run the frozen part, and open what it made."""
    if isinstance(tuned, SideTuned):
        keep_pooled(
            tuned.encoder.inner,
            inputs,
            rows,
            every_nth=tuned.encoder.config.every_nth,
            folder=folder,
            chunk=config.chunk,
            state_type=config.side_states,
            progress=progress,
        )
        return PooledFile(folder)
    tower = tower_of(tuned.encoder, inputs.modality)
    keep_states(tower, inputs, rows, frozen_blocks, folder=folder, chunk=config.chunk, progress=progress)
    return StateFile(folder)
