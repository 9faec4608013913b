"""The floor below all floors: every pair of a user and an item gets a number out of a hat."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender, Scorer


class RandomScoresConfig(BaseModel, frozen=True, extra="forbid"):
    """Random scores have no settings; the run's seed decides them."""


class RandomScores(Recommender):
    """Score of item i for user u: a hash of (seed, u, i), uniform on [0, 1).

    Random *embeddings* would not do: an item whose vector happens to be long would rank high or low for
    everybody. The hash costs no memory, and a block of users scores as it would alone.
    """

    scoring = "neighbours"

    key: Tensor

    def __init__(
        self,
        train: Interactions,
        features: FeatureTable,
        config: RandomScoresConfig,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(train, features, config, rng)
        self.register_buffer("key", torch.tensor(int(rng.integers(2**62))))  # saved: it is the whole model

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Raise: independent numbers are no product of two embeddings."""
        raise TypeError("RandomScores has no embeddings; ask its scorer(features) for scores.")

    @override
    def scorer(self, features: FeatureTable) -> Scorer:
        """Return what hashes the pairs of a block of users."""
        items = torch.arange(self.n_items, device=self.key.device)

        def score(users: Tensor) -> Tensor:
            mixed = _mix(self.key + users.unsqueeze(1) * self.n_items + items)
            return (mixed & 0xFFFFFF).float() / 2**24  # as many bits as a float32 holds

        return score


def _mix(numbers: Tensor) -> Tensor:
    """Scramble int64 numbers so that neighbours have nothing in common.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 17, on
    signed numbers: products wrap around, and masks make the shifts logical.
    """
    mixed = numbers * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 less 2^64: the golden gamma
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
