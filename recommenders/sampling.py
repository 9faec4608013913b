"""Negative items and the order of an epoch's pairs, drawn on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recommenders.interactions import Interactions


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's pairs and negatives, all rows int64 on one device."""

    users: Tensor
    """(B,) user rows."""
    positives: Tensor
    """(B,) item rows the users acted on."""
    negatives: Tensor
    """(B, N) item rows the users did not act on in training."""


class NegativeSampler:
    """Draws items uniformly among those a user has no training pair with.

    Raises:
        TrainingError: A training user has every item, so no negative exists.
    """

    def __init__(self, train: Interactions, device: torch.device | str = "cpu") -> None:
        raise NotImplementedError

    def sample(self, users: Tensor, n_negatives: int, generator: torch.Generator) -> Tensor:
        """Return (B, n_negatives) int64 item rows for (B,) user rows; repeats are possible."""
        raise NotImplementedError


class TrainingPairs:
    """All training pairs on the device, handed out shuffled and with negatives, once an epoch."""

    def __init__(self, train: Interactions, device: torch.device | str = "cpu") -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def n_batches(self, batch_size: int) -> int:
        """Return the number of batches of one epoch, the last and smaller one included."""
        raise NotImplementedError

    def epoch(self, batch_size: int, n_negatives: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield every pair once, in a new order, in batches (the last may be smaller) with negatives.

        ``generator`` lives on the pairs' device and is the only source of randomness: its state between two
        epochs (``get_state``, ``set_state``) is all that an exact resume needs.
        """
        raise NotImplementedError
