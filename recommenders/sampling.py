"""Negative items and the order of an epoch's pairs, drawn on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recommenders.errors import TrainingError
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

    No rejection: a user with positives p_0 < p_1 < ... has I - P free items, and the r-th of them is item
    r + |{j : p_j - j <= r}|, because p_j - j free items lie below p_j. One binary search over the sorted
    ``user * I + p_j - j`` of all users answers that for a whole batch, at equal cost for a user with nearly
    all items, and without waiting for the device.

    Raises:
        TrainingError: A user has every item, so no negative exists.
    """

    def __init__(self, train: Interactions, device: torch.device | str = "cpu") -> None:
        matrix = train.csr()
        starts = torch.from_numpy(matrix.indptr).to(torch.int64)
        counts = starts.diff()
        full = (counts >= train.n_items).nonzero()
        if len(full):
            raise TrainingError(
                f"User row {int(full[0])} has all {train.n_items} items in training ({len(full)} such); "
                "expected a free item to draw as a negative. Drop such users or hold out more of their pairs."
            )
        n_pairs = int(starts[-1])
        users = torch.arange(train.n_users).repeat_interleave(counts, output_size=n_pairs)
        places = torch.arange(n_pairs) - starts[users]  # j, counted within the user
        below = torch.from_numpy(matrix.indices).to(torch.int64) - places  # free items below each positive
        self.n_items = train.n_items
        self._starts = starts[:-1].to(device)
        self._n_free = (train.n_items - counts).to(device)
        self._keys = (users * train.n_items + below).to(device)

    def sample(self, users: Tensor, n_negatives: int, generator: torch.Generator) -> Tensor:
        """Draw negatives, with replacement.

        Args:
            users: (B,) int64 user rows on the sampler's device.
            n_negatives: N, drawn for each row of ``users`` independently.
            generator: On the sampler's device.

        Returns:
            (B, N) int64 item rows, each uniform over the free items of its user.
        """
        # A 63-bit number modulo the count: no item is off by more than one part in 2**63 / I.
        draws = torch.empty((len(users), n_negatives), dtype=torch.int64, device=users.device)
        ranks = draws.random_(generator=generator) % self._n_free[users, None]
        wanted = users[:, None] * self.n_items + ranks
        passed = torch.searchsorted(self._keys, wanted, right=True) - self._starts[users, None]
        return ranks + passed


class TrainingPairs:
    """All training pairs on the device, handed out shuffled and with negatives, once an epoch.

    Raises:
        TrainingError: As ``NegativeSampler``, or there is no training pair.
    """

    def __init__(self, train: Interactions, device: torch.device | str = "cpu") -> None:
        if not len(train):
            raise TrainingError("There is no training pair; expected at least one. Check split and filters.")
        self.sampler = NegativeSampler(train, device)
        self._users = torch.from_numpy(train.user_rows).to(device)
        self._items = torch.from_numpy(train.item_rows).to(device)

    def __len__(self) -> int:
        return len(self._users)

    def n_batches(self, batch_size: int) -> int:
        """Return the number of batches of one epoch, the last and smaller one included."""
        return -(-len(self) // batch_size)

    def epoch(self, batch_size: int, n_negatives: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield every pair once, in a new order, in batches (the last may be smaller) with negatives.

        ``generator`` lives on the pairs' device and is the only source of randomness: its state between two
        epochs (``get_state``, ``set_state``) is all that an exact resume needs.
        """
        order = torch.randperm(len(self), generator=generator, device=self._users.device)
        for rows in torch.split(order, batch_size):
            users = self._users[rows]
            yield Batch(users, self._items[rows], self.sampler.sample(users, n_negatives, generator))
