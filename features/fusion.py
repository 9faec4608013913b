"""Several modalities of one catalogue made into one table."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from features.errors import FeatureError
from features.imputation import Filled
from features.transforms import TransformConfig, fit_transform, unit_length

_BLOCK_ROWS = 4096
"""Items whose parts are added at once, in float64."""

FuseHow = Literal["concat", "sum", "mean", "pca"]


def fuse(
    parts: Mapping[str, Filled],
    present: Tensor,
    how: FuseHow,
    *,
    dim: int = 0,
    normalise: Literal["none", "l2"] = "none",
) -> Filled:
    """Join the parts of each item into one vector.

    A part that an item does not have, and that no rule filled, counts as zeros; ``mean`` leaves it out.

    Args:
        parts: Name -> (I, F_m) vectors and which of them are known.
        present: (I,) bool, items with at least one part of their own; the components of ``pca`` are fitted on
            these.
        how: ``concat``: one part after the other; ``sum`` and ``mean``: number by number; ``pca``: principal
            components of the concatenation.
        dim: Components of ``pca``; 0: as many as there are.
        normalise: ``l2`` gives the components of an item length 1; the other ways leave lengths as they come.

    Returns:
        (I, G) float32, zeros for an item without any known part; (I,) bool, which have one.

    Raises:
        FeatureError: Parts of unequal width cannot be added, or ``dim`` is more than there are.
    """
    known = torch.stack([part.known for part in parts.values()]).any(dim=0)
    if how in ("concat", "pca"):
        joined = torch.cat([_or_zeros(part) for part in parts.values()], dim=1)
        if how == "concat":
            return Filled(joined, known)
        config = TransformConfig(normalise="none", project="pca", project_dim=dim)
        fitted = fit_transform(joined, present, config, f"the concatenation of {', '.join(parts)}")
        if normalise == "l2":
            fitted.maps.append(unit_length)
        return Filled(fitted.apply(joined, known), known)
    _check_equal_widths(parts, how)
    counts = torch.stack([part.known for part in parts.values()]).sum(dim=0).clamp(min=1)
    result = torch.empty(next(iter(parts.values())).vectors.shape)
    for start in range(0, len(result), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = [_or_zeros(Filled(part.vectors[rows], part.known[rows])) for part in parts.values()]
        total = torch.stack(block).double().sum(dim=0)
        result[rows] = (total / counts[rows].unsqueeze(1) if how == "mean" else total).float()
    return Filled(result, known)


def _or_zeros(part: Filled) -> Tensor:
    return torch.where(part.known.unsqueeze(1), part.vectors, 0.0).float()


def _check_equal_widths(parts: Mapping[str, Filled], how: str) -> None:
    widths = {name: part.vectors.shape[1] for name, part in parts.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise FeatureError(
            f"fuse is {how}, but the widths are {shown}; expected equal ones; bring them to "
            f"one by project: pca and project_dim: {min(widths.values())} or less, or fuse by concat or pca."
        )
