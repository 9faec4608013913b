"""Simulates the users of the demo: tastes, the utility of each product to each user, what they choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.datasets.demo_traits import TEXT_TRAITS, VISUAL_TRAITS, ProductTraits, Trait

Float32Array = NDArray[np.float32]

SIGNAL = 2.2
"""Standard deviation of what either modality adds to a user's utilities; a choice's noise has 1.28."""
POPULARITY = 0.3
"""Standard deviation of what all users agree on, whatever the traits."""
N_CIRCLES = 30
"""Users of one circle share some of their taste; a circle has its own."""
CIRCLE_SHARE = 0.2
"""Share of the variance of a taste that is the circle's."""
FIRST_SECOND, LAST_SECOND = 1_672_531_200, 1_704_067_199
"""The year 2023 in Unix time."""


@dataclass(frozen=True)
class Choices:
    """Who chose what and when: (E,) each, users in order, the times of a user in order."""

    user_rows: NDArray[np.int64]
    item_rows: NDArray[np.int64]
    timestamps: NDArray[np.int64]


def utilities(traits: ProductTraits, n_users: int, rng: np.random.Generator) -> Float32Array:
    """Return the (U, I) utility of each product to each user, before the noise of choosing.

    It is the sum of a visual part and a text part of equal spread, and of a popularity that users share.
    The ranking of a user's utilities is the best that any recommender can do.
    """
    visual = _modality_part(VISUAL_TRAITS, traits, n_users, rng)
    textual = _modality_part(TEXT_TRAITS, traits, n_users, rng)
    popularity = rng.normal(0.0, POPULARITY, size=len(traits)).astype(np.float32)
    total: Float32Array = visual + textual + popularity
    return total


def choose(
    scores: Float32Array, fewest: int, most: int, rng: np.random.Generator, block_users: int = 512
) -> Choices:
    """Let every user choose ``fewest`` to ``most`` different products, with chances that grow with utility.

    The highest utilities plus Gumbel noise are a draw without replacement from the softmax of the utilities.

    Args:
        scores: (U, I) utilities.
        fewest: Smallest number of choices of a user.
        most: Largest number, at most I.
        rng: Draws the noise, the numbers and the times.
        block_users: Users at a time, as the noise is a matrix; the result does not depend on it.

    Source: Kool et al., "Stochastic Beams and Where to Find Them", ICML 2019, section 2.3 (Gumbel top-k).
    """
    n_users = len(scores)
    counts = rng.integers(fewest, most + 1, size=n_users)
    users, items = [], []
    for start in range(0, n_users, block_users):
        block = scores[start : start + block_users]
        noisy = block + rng.gumbel(size=block.shape).astype(np.float32)
        best = np.argsort(-noisy, axis=1, kind="stable")[:, :most]
        taken = np.arange(best.shape[1]) < counts[start : start + len(block), None]
        rows, _ = np.nonzero(taken)
        users.append(rows + start)
        items.append(best[taken])
    user_rows, item_rows = np.concatenate(users), np.concatenate(items)
    timestamps = rng.integers(FIRST_SECOND, LAST_SECOND + 1, size=len(user_rows))
    order = np.lexsort((timestamps, user_rows))
    return Choices(user_rows[order].astype(np.int64), item_rows[order].astype(np.int64), timestamps[order])


def interaction_table(choices: Choices, item_ids: list[str]) -> pl.DataFrame:
    """The choices as a table of user_id, item_id and timestamp."""
    user_ids = np.char.add("user-", np.char.zfill(choices.user_rows.astype(str), 5))
    return pl.DataFrame(
        {
            "user_id": user_ids.tolist(),
            "item_id": pl.Series(item_ids).gather(choices.item_rows),
            "timestamp": choices.timestamps,
        }
    )


def _modality_part(
    modality: tuple[Trait, ...], traits: ProductTraits, n_users: int, rng: np.random.Generator
) -> Float32Array:
    """(U, I): what the traits of one modality add to the utilities, of standard deviation ``SIGNAL``."""
    circle = rng.integers(N_CIRCLES, size=n_users)
    part = np.zeros((n_users, len(traits)), dtype=np.float32)
    for trait in modality:
        shared = rng.standard_normal((N_CIRCLES, len(trait.values)), dtype=np.float32)[circle]
        own = rng.standard_normal((n_users, len(trait.values)), dtype=np.float32)
        taste = np.sqrt(CIRCLE_SHARE) * shared + np.sqrt(1.0 - CIRCLE_SHARE) * own
        part += np.float32(trait.weight) * taste[:, traits.values[trait.name]]
    spread = np.sqrt(sum(trait.weight**2 for trait in modality))
    scaled: Float32Array = part * np.float32(SIGNAL / spread)
    return scaled
