"""Negatives from a pool that all pairs of a step share, so that few items have to be encoded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recommenders.interactions import Interactions
from recommenders.sampling import Batch, TrainingPairs

_BLOCK = 1 << 22
"""Places of a pool looked up at once."""


class PooledPairs(TrainingPairs):
    """Training pairs whose negatives come from one pool a step.

    A step draws a pool of distinct items, uniformly; the negatives of a pair are drawn from those of the pool
    that its user has no training pair with, with equal chances. A user who has the whole pool gets free items
    from outside. A step thus touches at most its positives and the pool, whatever the batch is.

    Args:
        train: The pairs.
        pool_size: Distinct items of a pool; all items where there are fewer.
        device: Where everything is drawn.
    """

    def __init__(self, train: Interactions, pool_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__(train, device)
        self.n_items, self.pool_size = train.n_items, min(pool_size, train.n_items)
        self._seen = torch.from_numpy(train.keys()).to(device)  # user * I + item, ascending

    def epoch(self, batch_size: int, n_negatives: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield every pair once, as ``TrainingPairs`` does, with negatives from the step's pool."""
        for batch in super().epoch(batch_size, n_negatives, generator):
            drawn = torch.randperm(self.n_items, generator=generator, device=batch.users.device)
            pool = drawn[: self.pool_size]
            negatives = self._from_pool(batch.users, pool, batch.negatives, generator)
            yield Batch(batch.users, batch.positives, negatives)

    def _from_pool(
        self, users: Tensor, pool: Tensor, otherwise: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return (B, N) items of the (P,) pool, those of ``otherwise`` (B, N) where a user has all of it."""
        step = max(1, _BLOCK // len(pool))
        taken = []
        for start in range(0, len(users), step):
            keys = users[start : start + step, None] * self.n_items + pool  # (b, P)
            places = torch.searchsorted(self._seen, keys).clamp_max(len(self._seen) - 1)
            free = self._seen[places] != keys
            n_free = free.sum(dim=1, keepdim=True)
            # The r-th free place of each row, r uniform: the first place whose count of free ones exceeds r.
            rolls = torch.rand(
                len(keys), otherwise.shape[1], generator=generator, device=keys.device, dtype=torch.float64
            )
            wanted = (rolls * n_free).long() + 1
            chosen = torch.searchsorted(free.cumsum(dim=1), wanted).clamp_max(len(pool) - 1)
            taken.append(torch.where(n_free > 0, pool[chosen], otherwise[start : start + step]))
        return torch.cat(taken)
