"""Training, validation and test: each published or usual rule as its own function, seeded.

A rule gives every interaction a label (``TRAIN``, ``VALID``, ``TEST``). It depends on the set of
interactions and the seed, not on the order of the rows in a file. What the rules share:

- Per-user rules leave every user at least one training pair. A user with one or two pairs is trained on only,
  except in the leave-one-out rules, where two pairs are one for training and one for test.
- Equal times are ordered by item row (global time: by user row, then item row), so that files with day
  granularity always split alike.
- Held-out pairs whose user or item training never saw are kept; ``Split.summary`` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, model_validator

from recommenders.errors import SplitError
from recommenders.interactions import PARTS, Int64Array, Interactions, Split

Labels = NDArray[np.int8]
"""(E,) one label an interaction."""
TRAIN, VALID, TEST = range(3)

SplitRule = Literal[
    "given",
    "ratio_mmrec",
    "ratio_lattice",
    "leave_one_out",
    "leave_last_out",
    "user_time",
    "global_time",
    "cold_items",
]


class SplitConfig(BaseModel, frozen=True, extra="forbid"):
    """How interactions are divided into training, validation and test."""

    rule: SplitRule = Field(
        "ratio_mmrec",
        description="given: as in the file; ratio_mmrec, ratio_lattice: a random share of each user's pairs, "
        "the odd one to test or to validation; leave_one_out, leave_last_out: one pair each of a user, "
        "random or the latest; user_time: the latest share of each user; global_time: the latest share "
        "of all; cold_items: all pairs of random items.",
    )
    valid_share: float = Field(0.1, gt=0, lt=1, description="Share of pairs (of items for cold_items).")
    test_share: float = Field(0.1, gt=0, lt=1, description="Share of pairs (of items for cold_items).")
    seed: NonNegativeInt = Field(0, description="Seed of the rules that draw.")

    @model_validator(mode="after")
    def _leave_training(self) -> Self:
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                f"valid_share + test_share is {self.valid_share + self.test_share:g}; expected below 1, "
                "so that training is left something."
            )
        return self


def split_interactions(
    interactions: Interactions, config: SplitConfig, given: Int64Array | None = None
) -> Split:
    """Split by the configured rule.

    Args:
        interactions: All pairs.
        config: Rule, shares and seed.
        given: (E,) labels 0, 1, 2 that came with the data, for the rule ``given``.

    Raises:
        SplitError: Times or given labels are missing, a part stays empty, or a pair is in two parts.
    """
    return split_by_labels(interactions, split_labels(interactions, config, given), config.rule)


def split_labels(interactions: Interactions, config: SplitConfig, given: Int64Array | None = None) -> Labels:
    """Label every interaction by the configured rule; as ``split_interactions``, before it is taken apart."""
    if not len(interactions):
        raise SplitError("There are no interactions to split; expected at least three. Check the filters.")
    if config.rule == "given":
        return given_labels(interactions, given)
    return RULES[config.rule](interactions, config, np.random.default_rng(config.seed))


def split_by_labels(interactions: Interactions, labels: Labels, rule: str) -> Split:
    """Take labelled interactions apart.

    Raises:
        SplitError: A part stays empty, or a pair is in two parts.
    """
    parts = [interactions.take(labels == label) for label in (TRAIN, VALID, TEST)]
    for name, part in zip(PARTS, parts, strict=True):
        if not len(part):
            raise SplitError(
                f"Split rule {rule!r} leaves no {name} pairs of {len(interactions)} interactions; expected "
                "at least one. Take a larger share, another rule, or more data (weaker filters)."
            )
    n_distinct = len(interactions.keys())
    n_shared = sum(len(part.keys()) for part in parts) - n_distinct
    if n_shared:
        raise SplitError(
            f"{n_shared} of {n_distinct} user-item pairs are in two parts of split {rule!r}; expected each "
            "in one, as a trained pair is masked and could never be found. Set the filter of duplicates "
            "to keep one of each."
        )
    return Split(parts[TRAIN], parts[VALID], parts[TEST], rule)


def given_labels(interactions: Interactions, given: Int64Array | None) -> Labels:
    """The labels that came with the data.

    Raises:
        SplitError: There are none, or there are others than 0 (train), 1 (valid) and 2 (test).
    """
    if given is None:
        raise SplitError(
            "Split rule 'given' needs the data's own split, which it does not name; expected a column with "
            "train, valid and test (0, 1, 2). Name the column, or set split.rule to 'ratio_mmrec'."
        )
    if len(given) != len(interactions):
        raise ValueError(f"given has {len(given)} labels for {len(interactions)} interactions.")
    wrong = np.setdiff1d(given, (TRAIN, VALID, TEST))
    if len(wrong):
        raise SplitError(
            f"The given split holds label {wrong[0]}; expected 0 (train), 1 (valid) or 2 (test). "
            "Correct the column, or set split.rule to another rule."
        )
    return np.asarray(given, dtype=np.int8)


def ratio_mmrec(interactions: Interactions, config: SplitConfig, rng: np.random.Generator) -> Labels:
    """Random share of each user's pairs; of an odd number held out, test gets one more (MMRec).

    With H = floor(n x (valid_share + test_share)) of a user's n pairs held out, validation gets
    floor(H x valid_share / (valid_share + test_share)), test the rest, and each at least one (which at 0.1
    and 0.1 decides for n below 10). On Amazon Baby at 0.1 and 0.1: the published 118,551 /
    20,559 / 21,682. Source: MMRec's ``preprocessing/1splitting.ipynb`` (there unseeded).
    """
    n_valid, n_test = _shares(interactions.items_per_user(), config, odd_to="test")
    return _label_last(interactions.user_rows, _shuffled_by_user(interactions, rng), n_valid, n_test)


def ratio_lattice(interactions: Interactions, config: SplitConfig, rng: np.random.Generator) -> Labels:
    """Random share of each user's pairs; of an odd number held out, validation gets one more (LATTICE).

    As ``ratio_mmrec`` with the parts' roles exchanged; on Amazon Baby 118,551 / 21,682 / 20,559.
    Source: LATTICE's ``data/build_data.py``.
    """
    n_valid, n_test = _shares(interactions.items_per_user(), config, odd_to="valid")
    return _label_last(interactions.user_rows, _shuffled_by_user(interactions, rng), n_valid, n_test)


def user_time(interactions: Interactions, config: SplitConfig, _rng: np.random.Generator) -> Labels:
    """The latest share of each user's pairs, validation before test; counts as in ``ratio_mmrec``."""
    n_valid, n_test = _shares(interactions.items_per_user(), config, odd_to="test")
    return _label_last(interactions.user_rows, _by_user_and_time(interactions, "user_time"), n_valid, n_test)


def leave_one_out(interactions: Interactions, _config: SplitConfig, rng: np.random.Generator) -> Labels:
    """One random pair a user for test and another for validation; shares are not used.

    Users with two pairs have none in validation, users with one are trained on only.
    """
    n_valid, n_test = _one_each(interactions.items_per_user())
    return _label_last(interactions.user_rows, _shuffled_by_user(interactions, rng), n_valid, n_test)


def leave_last_out(interactions: Interactions, _config: SplitConfig, _rng: np.random.Generator) -> Labels:
    """Each user's latest pair for test and the one before for validation; otherwise as ``leave_one_out``."""
    n_valid, n_test = _one_each(interactions.items_per_user())
    order = _by_user_and_time(interactions, "leave_last_out")
    return _label_last(interactions.user_rows, order, n_valid, n_test)


def global_time(interactions: Interactions, config: SplitConfig, _rng: np.random.Generator) -> Labels:
    """The latest pairs of all for test, those before for validation: floor(E x share) pairs each.

    Nothing in training is later than anything held out. Users and items that appear late have no training
    pairs; they are kept and counted.
    """
    times = _times(interactions, "global_time")
    order = np.lexsort((interactions.item_rows, interactions.user_rows, times))
    n_valid, n_test = _floored(len(order), config.valid_share), _floored(len(order), config.test_share)
    labels = np.full(len(order), TRAIN, dtype=np.int8)
    labels[order[len(order) - n_valid - n_test :]] = VALID
    labels[order[len(order) - n_test :]] = TEST
    return labels


def cold_items(interactions: Interactions, config: SplitConfig, rng: np.random.Generator) -> Labels:
    """All pairs of random items: test items are in no other part, nor are validation items.

    Shares are of the items with any pair, rounded down, at least one item each. A user all of whose items
    were drawn has no training pair left; such users are kept and counted.
    """
    items = np.unique(interactions.item_rows)
    n_valid, n_test = (
        max(1, _floored(len(items), share)) for share in (config.valid_share, config.test_share)
    )
    drawn = rng.permutation(items)
    label_of_item = np.full(interactions.n_items, TRAIN, dtype=np.int8)
    label_of_item[drawn[:n_test]] = TEST
    label_of_item[drawn[n_test : n_test + n_valid]] = VALID
    return label_of_item[interactions.item_rows]


RULES: dict[str, Callable[[Interactions, SplitConfig, np.random.Generator], Labels]] = {
    "ratio_mmrec": ratio_mmrec,
    "ratio_lattice": ratio_lattice,
    "leave_one_out": leave_one_out,
    "leave_last_out": leave_last_out,
    "user_time": user_time,
    "global_time": global_time,
    "cold_items": cold_items,
}
"""Every rule but ``given``, which needs no rule."""


def _floored(count: int, share: float) -> int:
    """Return ``count * share`` rounded down, as if shares were exact decimals: 29% of 100 is 29."""
    return int(count * share + 1e-9)


def _shares(
    counts: Int64Array, config: SplitConfig, *, odd_to: Literal["valid", "test"]
) -> tuple[Int64Array, Int64Array]:
    """Return how many of each user's pairs go to validation and to test, (U,) each."""
    total = config.valid_share + config.test_share
    share = config.valid_share if odd_to == "test" else config.test_share
    held_out = np.floor(counts * total + 1e-9).astype(np.int64)
    fewer = np.floor(held_out * (share / total) + 1e-9).astype(np.int64).clip(min=1)
    more = (held_out - fewer).clip(min=1)
    # The published code gives a user with two pairs no training at all; its data (5-core) has no such user.
    fewer[counts < 3], more[counts < 3] = 0, 0
    return (fewer, more) if odd_to == "test" else (more, fewer)


def _one_each(counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return one validation and one test pair for each user who keeps a training pair then, (U,) each."""
    return (counts >= 3).astype(np.int64), (counts >= 2).astype(np.int64)


def _label_last(user_rows: Int64Array, order: Int64Array, n_valid: Int64Array, n_test: Int64Array) -> Labels:
    """Label the last ``n_test`` pairs of each user TEST and the ``n_valid`` before them VALID.

    Args:
        user_rows: (E,) user of each pair.
        order: (E,) positions of the pairs, users ascending, each user's pairs first to last.
        n_valid: (U,) count for each user.
        n_test: (U,) count for each user.
    """
    users = user_rows[order]
    ends = np.cumsum(np.bincount(users, minlength=len(n_test)))
    from_end = ends[users] - np.arange(len(users))  # 1 for a user's last pair
    labels = np.full(len(users), TRAIN, dtype=np.int8)
    labels[order[from_end <= (n_test + n_valid)[users]]] = VALID
    labels[order[from_end <= n_test[users]]] = TEST
    return labels


def _shuffled_by_user(interactions: Interactions, rng: np.random.Generator) -> Int64Array:
    """Return the positions of the pairs, users ascending, each user's pairs in random order."""
    # Drawn for the pairs in the order of their rows, so that a shuffled file splits alike.
    canonical = np.lexsort((interactions.item_rows, interactions.user_rows))
    draws = rng.random(len(canonical))
    return canonical[np.lexsort((draws, interactions.user_rows[canonical]))]


def _by_user_and_time(interactions: Interactions, rule: str) -> Int64Array:
    """Return the positions of the pairs, users ascending, each user's pairs by time, then item row."""
    times = _times(interactions, rule)
    return np.lexsort((interactions.item_rows, times, interactions.user_rows))


def _times(interactions: Interactions, rule: str) -> Int64Array:
    """Return the times.

    Raises:
        SplitError: There are none.
    """
    if interactions.timestamps is None:
        raise SplitError(
            f"Split rule {rule!r} needs times, which the interactions lack; expected a column 'timestamp'. "
            "Name the file's time column in the importer's settings, or set split.rule to 'ratio_mmrec'."
        )
    return interactions.timestamps
