"""From opened states to a source of vectors, where they fit the encoder, its blocks and the items."""

import torch
from torch import Tensor

from features.catalogue import Catalogue, Modality
from features.errors import FeatureError
from features.live.pooled import PooledFile
from features.live.sources import SideStates, UpperBlocks, VectorSource
from features.live.states import StateFile
from features.tuning.modes import Tuned
from features.tuning.side import states_read
from features.tuning.side_mode import SideTuned
from features.tuning.towers import tower_of

Kept = StateFile | PooledFile
"""States below some block, or pooled states of many."""


def kept_source(
    tuned: Tuned | SideTuned,
    modality: Modality,
    kept: Kept,
    *,
    catalogue: Catalogue,
    present: Tensor,
    device: torch.device,
) -> VectorSource:
    """Have vectors made from kept states.

    Args:
        tuned: What is trained.
        modality: Whose states they are.
        kept: The states.
        catalogue: Whose items they are of.
        present: (I,) bool, the rows that will be asked for.
        device: Of the encoder.

    Raises:
        FeatureError: They are of another kind, other blocks, or of other items, or lack rows.
    """
    if len(kept) != len(catalogue):
        raise FeatureError(
            f"the kept {modality} states are of {len(kept):,} items, the catalogue has {len(catalogue):,}; "
            "keep states of this catalogue."
        )
    lost = kept.rows.missing(present.nonzero().squeeze(1))
    if lost:
        raise FeatureError(
            f"the kept {modality} states lack {len(lost):,} of {int(present.sum()):,} items that have "
            f"features, first {catalogue.item_ids[lost[0]]!r}, which could not be read when they were made; "
            "put the files back and make the states again, or set live.keep_states to false."
        )
    if isinstance(tuned, SideTuned):
        return _from_pooled(tuned, modality, kept, device)
    if not isinstance(kept, StateFile):
        raise _misfit(modality, "pooled", "whole ones, as blocks are trained")
    frozen = tuned.frozen_blocks(modality)
    if frozen is None or kept.start > frozen:
        free = "its stem is" if frozen is None else f"block {frozen} is"
        raise _misfit(modality, f"those before block {kept.start}", f"others, as {free} trained")
    return UpperBlocks(tower_of(tuned.encoder, modality), kept, device)


def _from_pooled(tuned: SideTuned, modality: Modality, kept: Kept, device: torch.device) -> VectorSource:
    side = tuned.encoder.side(modality)
    if not isinstance(kept, PooledFile) or side is None:
        what = "pooled" if isinstance(kept, PooledFile) else "whole"
        raise _misfit(modality, what, "pooled ones" if side else "none, as this tower has no side network")
    blocks = states_read(tower_of(tuned.encoder.inner, modality).n_blocks, tuned.encoder.config.every_nth)
    if (kept.blocks, kept.widths) != (blocks, side.widths):
        raise _misfit(
            modality,
            f"those after {kept.blocks} blocks, of widths {kept.widths}",
            f"those after {blocks}, of widths {side.widths}",
        )
    return SideStates(side, kept, device)


def _misfit(modality: Modality, found: str, wanted: str) -> FeatureError:
    return FeatureError(
        f"the kept {modality} states are {found}; expected {wanted}. They were made for another encoder or "
        "other settings; make them anew."
    )
