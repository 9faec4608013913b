"""What a recommender is given about its items: one table of vectors a modality, in item order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Item features by modality, aligned to the dataset's item order, filled and normalised.

    The order of the modalities is that of ``vectors``; models that concatenate them follow it.

    Raises:
        ValueError: Modalities without a mask, masks without vectors, or tables over unequal numbers of items.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Modality to (I, F_m) floats; rows of absent items hold what the run's fill rule put there."""
    present: dict[str, Tensor] = field(default_factory=dict)
    """Modality to (I,) bool: which items really have the modality."""

    def __post_init__(self) -> None:
        """Check that vectors and masks belong together."""
        if list(self.vectors) != list(self.present):
            raise ValueError(
                f"vectors has modalities {list(self.vectors)}, present {list(self.present)}; expected equal."
            )
        for name, table in self.vectors.items():
            mask = self.present[name]
            if table.ndim != 2 or not table.is_floating_point():
                raise ValueError(f"{name!r} is {table.dtype} {tuple(table.shape)}; expected floats (I, F).")
            if mask.dtype != torch.bool or mask.shape != table.shape[:1]:
                raise ValueError(
                    f"present[{name!r}] is {mask.dtype} {tuple(mask.shape)}; expected bool ({len(table)},)."
                )
        if len({len(table) for table in self.vectors.values()}) > 1:
            sizes = {name: len(table) for name, table in self.vectors.items()}
            raise ValueError(f"Modalities cover unequal numbers of items: {sizes}; expected one item order.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in their order."""
        return tuple(self.vectors)

    @property
    def dims(self) -> dict[str, int]:
        """Modality to its width F_m."""
        return {name: table.shape[1] for name, table in self.vectors.items()}

    @property
    def n_items(self) -> int:
        """Number of items, 0 for a table without modalities (models that read no features)."""
        return len(next(iter(self.vectors.values()))) if self.vectors else 0

    def to(self, device: torch.device | str) -> FeatureTable:
        """Return the same table on another device."""
        return FeatureTable(
            {name: table.to(device) for name, table in self.vectors.items()},
            {name: mask.to(device) for name, mask in self.present.items()},
        )
