"""The floor without taste: every user gets what most users took."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender


class PopularityConfig(BaseModel, frozen=True, extra="forbid"):
    """Popularity has no settings."""


class Popularity(Recommender):
    """Score of an item: the number of its training interactions, the same for all users."""

    counts: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: PopularityConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.register_buffer("counts", torch.from_numpy(train.users_per_item()).float())  # (I,)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return (U, 1) ones and (I, 1) counts."""
        return self.counts.new_ones(self.n_users, 1), self.counts.unsqueeze(1)
