"""Negative items and the order of an epoch's pairs, drawn on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from recommenders.errors import TrainingError
from recommenders.interactions import Interactions
from recommenders.settings import Counts

PairScores = Callable[[Tensor, Tensor], Tensor]
"""Takes (B,) user rows and (B, K) item rows and returns their (B, K) scores, without gradients."""

_TOTAL_WEIGHT = 2**40
"""What the whole numbers that stand for items' weights add up to: a millionth of a millionth each."""
_KEY_RANGE = 2**61
"""Users times the total weight stays below, so that one int64 holds both."""
_AHEAD = 1 << 17
"""Negatives drawn at once, of many batches together: for a single one calls take longer than the work."""
_REDRAWS = 8
"""Times that an item of the batch which the user has is drawn again before a free item takes its place."""


class SamplingConfig(BaseModel, frozen=True, extra="forbid"):
    """Which items are drawn as negatives."""

    negatives: Annotated[Literal["uniform", "popularity", "in-batch", "hard"], Counts.IF_CHANGED] = Field(
        "uniform",
        description="Which free items are drawn as negatives: any; popular ones more often; positives of "
        "other pairs of the batch; or of some drawn, the one that the model scores highest.",
    )
    popularity_alpha: Annotated[NonNegativeFloat, Counts.IF_CHANGED] = Field(
        0.75,
        description="`popularity` draws an item with a chance proportional to its training interactions to "
        "this power: 0 is uniform, 1 proportional.",
    )
    hard_candidates: Annotated[PositiveInt, Counts.IF_CHANGED] = Field(
        8, description="Items drawn for each negative of `hard`, of which the highest scored is taken."
    )


@dataclass(frozen=True, eq=False)
class InBatch:
    """What a loss that tells all positives of a batch apart needs to know of them."""

    log_q: Tensor
    """(B,) float32 logarithm of each positive's share of the training pairs: its chance to be in a batch."""
    taken: Tensor
    """(B, B) bool: the user of the row has the positive of the column in training. True on the diagonal."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's pairs and negatives, all rows int64 on one device."""

    users: Tensor
    """(B,) user rows."""
    positives: Tensor
    """(B,) item rows the users acted on."""
    negatives: Tensor
    """(B, N) item rows the users did not act on in training."""
    in_batch: InBatch | None = None
    """Set where negatives are the batch's own positives: then a loss may take all of them."""


class NegativeSampler:
    """Draws items uniformly among those a user has no training pair with.

    No rejection: a user with positives p_0 < p_1 < ... has I - P free items, and the r-th of them is item
    r + |{j : p_j - j <= r}|, because p_j - j free items lie below p_j. One binary search over the sorted
    ``user * I + p_j - j`` of all users answers that for a whole batch, at equal cost for a user with nearly
    all items, and without waiting for the device.

    Raises:
        TrainingError: A user has every item, so no negative exists.
    """

    draws_ahead: ClassVar[bool] = True
    """Whether a negative depends on its own pair alone, so that those of many batches may come at once."""

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
        self.n_users, self.n_items = train.n_users, train.n_items
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

    def batch(self, users: Tensor, positives: Tensor, n_negatives: int, generator: torch.Generator) -> Batch:
        """Return (B,) pairs with N negatives each, drawn as ``sample`` says."""
        return Batch(users, positives, self.sample(users, n_negatives, generator))


class PopularitySampler(NegativeSampler):
    """Draws free items with a chance proportional to degree ** alpha, counted over training pairs.

    As the uniform sampler, without rejection and in whole numbers, so that a positive is never drawn: items
    lie side by side on a line, each as long as its weight, a user's positives are cut out of it, and a point
    on what is left leads to an item by two binary searches. Weights are rounded to the 2^40th part of their
    sum, and none is below one such part, so an item that nobody took can be drawn, about never.

    Source of alpha = 0.75: Mikolov et al., "Distributed representations of words and phrases and their
    compositionality", NIPS 2013, sec. 2.2.

    Raises:
        TrainingError: As ``NegativeSampler``.
    """

    def __init__(self, train: Interactions, alpha: float, device: torch.device | str = "cpu") -> None:
        super().__init__(train, device)
        matrix = train.csr()
        items = torch.from_numpy(matrix.indices).to(torch.int64)
        starts = torch.from_numpy(matrix.indptr).to(torch.int64)
        users = torch.arange(train.n_users).repeat_interleave(starts.diff(), output_size=len(items))
        weights = torch.bincount(items, minlength=train.n_items).double() ** alpha
        unit = min(_TOTAL_WEIGHT, _KEY_RANGE // (train.n_users + 1)) / weights.sum()
        lengths = (weights * unit).round().to(torch.int64).clamp(min=1)  # (I,)
        ends = lengths.cumsum(0)
        total = int(ends[-1])
        cut = torch.cat([lengths.new_zeros(1), lengths[items].cumsum(0)])  # (E + 1,) over all users in turn
        cut_before = cut[:-1] - cut[starts[users]]  # of the user's positives before this one
        self._total = total
        self._ends = ends.to(device)
        self._cut = cut.to(device)
        self._first_cut = cut[starts[:-1]].to(device)
        self._free_length = (total - (cut[starts[1:]] - cut[starts[:-1]])).to(device)
        self._weight_keys = (users * total + ends[items] - lengths[items] - cut_before).to(device)

    def sample(self, users: Tensor, n_negatives: int, generator: torch.Generator) -> Tensor:
        """Draw negatives, with replacement: (B, N) for (B,) users; see ``NegativeSampler.sample``."""
        draws = torch.empty((len(users), n_negatives), dtype=torch.int64, device=users.device)
        points = draws.random_(generator=generator) % self._free_length[users, None]
        passed = torch.searchsorted(self._weight_keys, users[:, None] * self._total + points, right=True)
        points = points + self._cut[passed] - self._first_cut[users, None]
        return torch.searchsorted(self._ends, points, right=True)


class InBatchSampler(NegativeSampler):
    """Takes the positives of a batch as the negatives of its other users, so that popular items come often.

    Losses over pairs get N of them a row, drawn with replacement; a softmax over the batch takes all, with
    the correction of ``log_q``. Items that the user has in training are no negatives.

    Source: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys
    2019, sec. 4. Shares are counted here, as all pairs are known; the paper estimates them from a stream.

    Raises:
        TrainingError: As ``NegativeSampler``.
    """

    draws_ahead = False

    def __init__(self, train: Interactions, device: torch.device | str = "cpu") -> None:
        super().__init__(train, device)
        matrix = train.csr()
        items = torch.from_numpy(train.item_rows).to(torch.int64)
        shares = torch.bincount(items, minlength=train.n_items).double() / max(len(items), 1)
        self._log_q = shares.log().float().to(device)  # -inf for items that are no positive
        self._items = torch.from_numpy(matrix.indices).to(torch.int64).to(device)
        self._n_own = train.n_items - self._n_free
        users = torch.arange(train.n_users, device=device).repeat_interleave(self._n_own)
        self._pair_keys = users * train.n_items + self._items  # ascending

    def batch(self, users: Tensor, positives: Tensor, n_negatives: int, generator: torch.Generator) -> Batch:
        """Return (B,) pairs with N positives of other rows each, and what a softmax over the batch needs.

        A drawn item that the user has is drawn again, at most eight times; then a free item of the catalogue,
        uniformly drawn, stands in, as there may be no other.
        """
        negatives = self.sample(users, n_negatives, generator)
        open_places = torch.ones_like(negatives, dtype=torch.bool)
        for _ in range(1 + _REDRAWS):
            columns = torch.randint(len(users), negatives.shape, generator=generator, device=users.device)
            drawn = positives[columns]
            good = open_places & ~self._has(users[:, None], drawn)
            negatives = torch.where(good, drawn, negatives)
            open_places = open_places & ~good
        return Batch(
            users, positives, negatives, InBatch(self._log_q[positives], self._taken(users, positives))
        )

    def _has(self, users: Tensor, items: Tensor) -> Tensor:
        """Tell for pairs of rows whether they are training pairs."""
        keys = users * self.n_items + items
        places = torch.searchsorted(self._pair_keys, keys).clamp(max=len(self._pair_keys) - 1)
        return self._pair_keys[places] == keys

    def _taken(self, users: Tensor, positives: Tensor) -> Tensor:
        """Return (B, B), by writing down what the users have instead of searching for every pair."""
        distinct, column_of = torch.unique(positives, return_inverse=True)
        place = torch.full((self.n_items,), len(distinct), dtype=torch.int64, device=users.device)
        place[distinct] = torch.arange(len(distinct), device=users.device)
        n_own = self._n_own[users]
        rows = torch.arange(len(users), device=users.device).repeat_interleave(n_own)
        offsets = torch.arange(len(rows), device=users.device) - (n_own.cumsum(0) - n_own)[rows]
        own = self._items[self._starts[users][rows] + offsets]
        # A row an item, as whole rows are copied fastest; the last takes all items that are not in the batch.
        has = torch.zeros(len(distinct) + 1, len(users), dtype=torch.bool, device=users.device)
        has[place[own], rows] = True
        return has.index_select(0, column_of).T


class HardSampler(NegativeSampler):
    """Draws m free items for each negative, uniformly, and takes the one that the model scores highest.

    Source: Zhang, Chen, Wang and Yu, "Optimizing top-n collaborative filtering via dynamic negative item
    sampling", SIGIR 2013, sec. 3.

    Raises:
        TrainingError: As ``NegativeSampler``.
    """

    draws_ahead = False

    def __init__(
        self,
        train: Interactions,
        n_candidates: int,
        scores: PairScores,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(train, device)
        self._n_candidates = n_candidates
        self._scores = scores

    def sample(self, users: Tensor, n_negatives: int, generator: torch.Generator) -> Tensor:
        """Draw negatives: (B, N) for (B,) users; of equal scores the first drawn."""
        candidates = super().sample(users, n_negatives * self._n_candidates, generator)
        scores = self._scores(users, candidates).view(len(users), n_negatives, self._n_candidates)
        best = scores.argmax(dim=2, keepdim=True)
        return candidates.view(scores.shape).gather(2, best).squeeze(2)


def negative_sampler(
    train: Interactions,
    config: SamplingConfig,
    device: torch.device | str = "cpu",
    scores: PairScores | None = None,
) -> NegativeSampler:
    """Return the sampler that the settings name.

    Args:
        train: Training pairs.
        config: Settings.
        device: Where rows are drawn.
        scores: How the model scores pairs; only ``hard`` asks.

    Raises:
        TrainingError: As ``NegativeSampler``, or ``hard`` without a model that scores pairs.
    """
    match config.negatives:
        case "uniform":
            return NegativeSampler(train, device)
        case "popularity":
            return PopularitySampler(train, config.popularity_alpha, device)
        case "in-batch":
            return InBatchSampler(train, device)
        case "hard":
            if scores is None:
                raise TrainingError(
                    "training.negatives is 'hard', which needs the scores of pairs while training, and this "
                    "model gives none; expected uniform, popularity or in-batch, or a model such as bpr."
                )
            return HardSampler(train, config.hard_candidates, scores, device)


class TrainingPairs:
    """All training pairs on the device, handed out shuffled and with negatives, once an epoch.

    Raises:
        TrainingError: As ``negative_sampler``, or there is no training pair.
    """

    def __init__(
        self,
        train: Interactions,
        device: torch.device | str = "cpu",
        config: SamplingConfig | None = None,
        scores: PairScores | None = None,
    ) -> None:
        if not len(train):
            raise TrainingError("There is no training pair; expected at least one. Check split and filters.")
        self.sampler = negative_sampler(train, config or SamplingConfig(), device, scores)
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
        n_ahead = max(1, _AHEAD // (batch_size * max(n_negatives, 1))) if self.sampler.draws_ahead else 1
        for rows in torch.split(order, n_ahead * batch_size):
            drawn = self.sampler.batch(self._users[rows], self._items[rows], n_negatives, generator)
            if n_ahead == 1:
                yield drawn
            else:
                columns = (drawn.users, drawn.positives, drawn.negatives)
                parts = (torch.split(column, batch_size) for column in columns)
                yield from map(Batch, *parts)
