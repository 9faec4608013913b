"""Full ranking: every item is scored for every user, seen items are masked, in blocks of bounded memory.

Rules that can change a figure:

- Users without held-out items are skipped; the means are over the others.
- Training items are always masked. ``mask_valid_in_test`` also masks validation items when testing. MMRec
  does not, and published numbers on its splits follow it, so the default is False: a validation item that a
  model ranks high then takes a place in the test list.
- Equal scores are ordered by the lower item row, exactly, so constant scores give the same list everywhere.
- All items are candidates, also those that training never saw. A score of -inf says "never recommend".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PositiveInt, field_validator
from scipy import sparse
from torch import Tensor

from recommenders.errors import TrainingError
from recommenders.interactions import Float32Array, Int64Array, Interactions, Split
from recommenders.metrics import coverage, metric_names, rank_metrics

Scorer = Callable[[Tensor], Tensor]
"""(B,) int64 user rows to (B, I) scores of all items, higher is better; the result is never written to."""

_BYTES_PER_SCORE = 16
"""At the peak: the scorer's floats, our copy of them, and masks and places while ties are broken."""


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """How recommendations are measured."""

    ks: tuple[PositiveInt, ...] = Field(
        (5, 10, 20, 50), min_length=1, description="List lengths k, ascending."
    )
    block_users: PositiveInt = Field(1024, description="Most users scored at a time.")
    block_mb: PositiveInt = Field(
        512, description="Most memory of a block of scores in MiB; large catalogues get fewer users a block."
    )
    candidates: Literal["all", "warm", "cold"] = Field(
        "all",
        description="Items that are ranked: all, or only those with (warm) or without (cold) training "
        "interactions. Never a random sample, whose metrics are inconsistent.",
    )
    auc: bool = Field(False, description="Measure the area under the ROC curve, too; sorts all scores.")
    mask_valid_in_test: bool = Field(
        False, description="Mask validation items, too, when testing; MMRec and its published numbers do not."
    )

    @field_validator("ks")
    @classmethod
    def _ascending(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if list(ks) != sorted(set(ks)):
            raise ValueError(f"ks is {ks}; expected different list lengths in ascending order.")
        return ks


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured on one part of a split."""

    metrics: dict[str, float]
    """``recall@20`` and so on: means over the evaluated users; and ``coverage@20`` over their lists."""
    per_user: pl.DataFrame
    """``user_row`` int64, ascending, and a float64 column a user metric."""
    n_skipped: int
    """Users without held-out items."""
    lists: NDArray[np.int32] | None = None
    """(U, K) item rows as ranked for the users of ``per_user``, -1 behind the last; None unless kept."""
    hits: NDArray[np.bool_] | None = None
    """(U, K) whether the item at each rank is held out; None unless kept."""
    relevant: Interactions | None = None
    """The pairs that were to be found; None unless lists are kept."""

    @property
    def n_users(self) -> int:
        """Number of users that were evaluated."""
        return len(self.per_user)


def evaluate(
    scorer: Scorer,
    held_out: Interactions,
    exclude: Interactions,
    config: EvaluationConfig,
    *,
    device: torch.device | str = "cpu",
    keep_lists: bool = False,
) -> Evaluation:
    """Rank all items for each user with held-out items and measure the lists.

    Args:
        scorer: Scores all items for a block of users.
        held_out: The pairs to find; repeated pairs count once.
        exclude: Seen pairs, masked. A pair that is both held out and excluded counts as missed.
        config: List lengths and block size.
        device: Where the user rows are put for the scorer; its scores may live where they like.
        keep_lists: Keep what was recommended, for `beyond_accuracy`; takes 5 bytes a place.

    Raises:
        TrainingError: A score is NaN or infinite, or no user has held-out items.
        ValueError: The scorer returns another shape than (B, I).
    """
    candidates = _candidates(config, exclude)
    if candidates is not None:
        inside = candidates[held_out.item_rows]
        users_of, items_of = held_out.user_rows[inside], held_out.item_rows[inside]
        held_out = Interactions(users_of, items_of, held_out.n_users, held_out.n_items)
    relevant = held_out.csr()
    n_relevant = np.diff(relevant.indptr).astype(np.int64)
    users = np.flatnonzero(n_relevant)
    if not len(users):
        raise TrainingError(
            f"None of {held_out.n_users} users has held-out items"
            + (f" among the {config.candidates} ones" if candidates is not None else "")
            + "; expected at least one. Choose another split rule or larger shares for validation and test."
        )
    names = user_metric_names(config)
    values = np.empty((len(users), len(names)))
    best_ranks = np.full(held_out.n_items, max(config.ks) + 1)
    ranks = np.arange(1, max(config.ks) + 1)
    done = 0
    kept: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    pairs = relevant if config.auc else None
    blocks = _ranked_blocks(
        scorer, users, max(config.ks), exclude, config, device=device, candidates=candidates, relevant=pairs
    )
    for block, items, scores, areas in blocks:
        recommended = scores > -np.inf
        hits = _contains(relevant[block], items) & recommended
        block_values = rank_metrics(hits, n_relevant[block], config.ks)
        if areas is not None:
            block_values["auc"] = areas
        if keep_lists:
            kept.append((np.where(recommended, items, -1).astype(np.int32), hits))
        values[done : done + len(block)] = np.stack([block_values[name] for name in names], axis=1)
        block_ranks = np.broadcast_to(ranks[: items.shape[1]], items.shape)
        np.minimum.at(best_ranks, items[recommended], block_ranks[recommended])
        done += len(block)
    means = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    per_user = pl.DataFrame(
        {"user_row": users.astype(np.int64)} | {name: values[:, i] for i, name in enumerate(names)}
    )
    measured = Evaluation(means | coverage(best_ranks, config.ks), per_user, held_out.n_users - len(users))
    if not keep_lists:
        return measured
    lists = np.concatenate([block_lists for block_lists, _ in kept])
    all_hits = np.concatenate([block_hits for _, block_hits in kept])
    return replace(measured, lists=lists, hits=all_hits, relevant=held_out)


def user_metric_names(config: EvaluationConfig) -> list[str]:
    """Names of what is measured of each user, in the order of the columns everywhere."""
    return [*metric_names(config.ks), *(["auc"] if config.auc else [])]


def _candidates(config: EvaluationConfig, exclude: Interactions) -> NDArray[np.bool_] | None:
    """(I,) the items that may be ranked; None for all."""
    if config.candidates == "all":
        return None
    warm: NDArray[np.bool_] = np.bincount(exclude.item_rows, minlength=exclude.n_items) > 0
    return warm if config.candidates == "warm" else ~warm


def evaluate_part(
    scorer: Scorer,
    split: Split,
    part: Literal["valid", "test"],
    config: EvaluationConfig,
    *,
    device: torch.device | str = "cpu",
    keep_lists: bool = False,
) -> Evaluation:
    """Evaluate on the validation or the test part of a split, with that part's seen items masked."""
    held_out = split.valid if part == "valid" else split.test
    seen = seen_before(split, part, config)
    return evaluate(scorer, held_out, seen, config, device=device, keep_lists=keep_lists)


def seen_before(split: Split, part: Literal["valid", "test"], config: EvaluationConfig) -> Interactions:
    """Return what is masked when ``part`` is measured: training, and validation in test if so configured."""
    masks_valid = part == "test" and config.mask_valid_in_test
    return split.train.plus(split.valid) if masks_valid else split.train


def recommend_top_k(
    scorer: Scorer,
    users: Int64Array,
    k: int,
    exclude: Interactions,
    config: EvaluationConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Int64Array, Float32Array]:
    """Return the k best unseen items of each user.

    Args:
        scorer: Scores all items for a block of users.
        users: (U,) user rows.
        k: List length; lists are as long as the catalogue where that is shorter.
        exclude: Seen pairs, never recommended.
        config: Block size.
        device: Where the user rows are put for the scorer.

    Returns:
        (U, k) item rows, best first, and their scores. Where a user has fewer than k unseen items, the rest
        of the row holds item -1 and score -inf.

    Raises:
        TrainingError: A score is NaN or infinite.
        ValueError: ``k`` is below 1, or the scorer returns another shape than (B, I).
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    blocks = list(_ranked_blocks(scorer, users, k, exclude, config or EvaluationConfig(), device=device))
    if not blocks:
        return np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32)
    scores = np.concatenate([block_scores for _, _, block_scores, _ in blocks])
    items = np.concatenate([block_items for _, block_items, _, _ in blocks])
    return np.where(scores > -np.inf, items, -1), scores


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best items a row, best first, equal scores by the lower item row.

    ``torch.topk`` picks freely among equal scores. One place more than asked for shows whether a row has
    equal scores that matter; only such rows are ranked again, exactly.

    Args:
        scores: (B, I) without NaN; -inf is allowed.
        k: List length, cut to I.

    Returns:
        (B, k) scores and (B, k) int64 item rows.
    """
    n_items = scores.shape[1]
    k = min(k, n_items)
    best, items = torch.topk(scores, min(k + 1, n_items), dim=1)
    tied = (best[:, 1:] == best[:, :-1]).any(dim=1).nonzero().squeeze(1)
    best, items = best[:, :k], items[:, :k]
    if len(tied):
        best, items = best.clone(), items.clone()
        best[tied], items[tied] = _settle_ties(scores[tied], best[tied], items[tied])
    return best, items


def _settle_ties(scores: Tensor, best: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Put equal scores of (B, k) lists in the order of item rows, and the right ones at the list's end.

    Everything above the last place's score is in the list already. The places after it belong to the lowest
    item rows with exactly that score, which a second ``topk``, over row numbers, finds.
    """
    n_items, k = scores.shape[1], items.shape[1]
    last = best[:, -1:]
    low_rows_first = torch.arange(n_items, 0, -1, dtype=torch.int32, device=scores.device)
    candidates = n_items - torch.topk(torch.where(scores == last, low_rows_first, 0), k, dim=1).values.long()
    n_better = (best > last).sum(dim=1, keepdim=True)
    places = torch.arange(k, device=scores.device)
    at_last = candidates.gather(1, (places - n_better).clamp(min=0))
    items, order = torch.where(places < n_better, items, at_last).sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, items.gather(1, order)


def _ranked_blocks(
    scorer: Scorer,
    users: Int64Array,
    k: int,
    exclude: Interactions,
    config: EvaluationConfig,
    *,
    device: torch.device | str,
    candidates: NDArray[np.bool_] | None = None,
    relevant: sparse.csr_matrix | None = None,
) -> Iterator[tuple[Int64Array, Int64Array, Float32Array, NDArray[np.float64] | None]]:
    """Yield (B,) users, (B, k) item rows and (B, k) scores of their lists; masked items score -inf.

    Where relevant pairs are given, the (B,) areas under the ROC curve come with them.
    """
    n_items = exclude.n_items
    seen = exclude.csr()
    step = _users_per_block(config, n_items)
    for start in range(0, len(users), step):
        block = users[start : start + step]
        with torch.no_grad():
            raw = scorer(torch.from_numpy(block).to(device))
            if raw.shape != (len(block), n_items):
                raise ValueError(f"Scores are {tuple(raw.shape)}; expected (B, I) = {(len(block), n_items)}.")
            # A copy: a scorer may hand out a view of what it keeps, such as one row for all users.
            scores = raw.to(torch.float32, copy=True)
            del raw
            # Flat positions: one index array to move, and one write.
            scores.view(-1)[torch.from_numpy(_flat_keys(seen[block])).to(scores.device)] = -torch.inf
            if candidates is not None:
                scores[:, torch.from_numpy(~candidates).to(scores.device)] = -torch.inf
            best, items = top_k(scores, k)
            _refuse_not_finite(best, block)
            areas = None if relevant is None else _areas(scores, relevant[block])
        yield block, items.cpu().numpy(), best.cpu().numpy(), areas


def _users_per_block(config: EvaluationConfig, n_items: int) -> int:
    memory_users = config.block_mb * 2**20 // (_BYTES_PER_SCORE * n_items)
    return max(1, min(config.block_users, memory_users))


def block_bytes(config: EvaluationConfig, n_items: int, n_users: int) -> int:
    """Return the most memory that the scores of a block of users take while they are ranked."""
    return min(_users_per_block(config, n_items), n_users) * n_items * _BYTES_PER_SCORE


def _areas(scores: Tensor, relevant: sparse.csr_matrix) -> NDArray[np.float64]:
    """Area under the ROC curve of each user: how often a relevant item beats another unmasked one, ties half.

    Args:
        scores: (B, I), masked items -inf.
        relevant: (B, I), at least one a row; masked ones count as beaten by all.
    """
    ordered = scores.sort(dim=1).values
    n_masked = (scores == -torch.inf).sum(dim=1)
    lengths = np.diff(relevant.indptr)
    rows = torch.from_numpy(np.repeat(np.arange(relevant.shape[0]), lengths)).to(scores.device)
    own = scores[rows, torch.from_numpy(relevant.indices.astype(np.int64)).to(scores.device)]
    lower, upper = torch.empty_like(rows), torch.empty_like(rows)
    for user in range(len(scores)):  # one search a user, as their numbers of relevant items differ
        mine = slice(int(relevant.indptr[user]), int(relevant.indptr[user + 1]))
        lower[mine] = torch.searchsorted(ordered[user], own[mine])
        upper[mine] = torch.searchsorted(ordered[user], own[mine], right=True)
    ranked = own > -torch.inf
    beaten = (lower - n_masked[rows]).double() + (upper - lower - 1).double() / 2
    wins = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    wins.index_add_(0, rows[ranked], beaten[ranked])
    n_relevant = torch.bincount(rows, minlength=len(scores)).double()
    n_ranked = torch.bincount(rows[ranked], minlength=len(scores)).double()
    wins -= n_ranked * (n_ranked - 1) / 2  # what relevant items win among themselves
    n_others = scores.shape[1] - n_masked.double() - n_ranked
    areas: NDArray[np.float64] = (wins / (n_relevant * n_others.clamp(min=1))).cpu().numpy()
    return areas


def _refuse_not_finite(best: Tensor, users: Int64Array) -> None:
    """Stop at NaN and +inf; ``torch.topk`` ranks NaN above all numbers, so the first place tells."""
    wrong = ~(best[:, 0] < torch.inf)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise TrainingError(
            f"User row {users[row]} has a score of {float(best[row, 0])}; expected finite scores. "
            "Training has diverged or features hold NaN: lower the learning rate or check the feature set."
        )


def _flat_keys(rows: sparse.csr_matrix) -> Int64Array:
    """Return ``row * n_columns + column`` of each stored entry, ascending."""
    return np.repeat(np.arange(rows.shape[0]) * rows.shape[1], np.diff(rows.indptr)) + rows.indices


def _contains(rows: sparse.csr_matrix, items: Int64Array) -> NDArray[np.bool_]:
    """Tell for (B, k) items whether each is in its row of the (B, I) matrix."""
    keys = _flat_keys(rows)
    wanted = items + (np.arange(len(items)) * rows.shape[1])[:, None]
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    found: NDArray[np.bool_] = keys[places] == wanted
    return found
