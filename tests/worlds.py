"""Tiny data with a known answer, shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split


@dataclass(frozen=True)
class World:
    """Interactions, their split and item features."""

    interactions: Interactions
    split: Split
    features: FeatureTable

    @property
    def n_users(self) -> int:
        return self.interactions.n_users

    @property
    def n_items(self) -> int:
        return self.interactions.n_items


def two_clubs(n_users: int = 8, n_items: int = 12, noise: float = 0.1, seed: int = 0) -> World:
    """Even users like all even items, odd users all odd items; the features tell the clubs apart.

    Each user's first item (by a rotation, so that items differ) is held out for validation and the next for
    test. A model that has learnt anything ranks both above every item of the other club.
    """
    rng = np.random.default_rng(seed)
    users, items, labels = [], [], []
    for user in range(n_users):
        liked = np.arange(user % 2, n_items, 2)
        liked = np.roll(liked, -(user // 2))
        users += [user] * len(liked)
        items += liked.tolist()
        labels += [1, 2] + [0] * (len(liked) - 2)
    interactions = interactions_of(list(zip(users, items, strict=True)), n_users, n_items)
    label = np.array(labels)
    parts = [interactions.take(label == part) for part in range(3)]
    club = np.stack([np.arange(n_items) % 2 == 0, np.arange(n_items) % 2 == 1], axis=1).astype(np.float32)
    vectors = {
        name: torch.from_numpy(club + noise * rng.standard_normal(club.shape, dtype=np.float32))
        for name in ("image", "text")
    }
    present = {name: torch.ones(n_items, dtype=torch.bool) for name in vectors}
    return World(interactions, Split(*parts, rule="two_clubs"), FeatureTable(vectors, present))


def random_world(
    n_users: int = 30, n_items: int = 40, density: float = 0.2, seed: int = 0, dim: int = 6
) -> World:
    """Unrelated random pairs and features; every user has three items or more, two of them held out."""
    rng = np.random.default_rng(seed)
    chance = rng.random((n_users, n_items))
    liked = chance < np.maximum(density, np.sort(chance, axis=1)[:, [2]] + 1e-12)
    users, items = np.nonzero(liked)
    shuffled = rng.permutation(len(users))
    users, items = users[shuffled], items[shuffled]
    interactions = Interactions(
        users, items, n_users, n_items, timestamps=rng.integers(0, 1000, len(users)), ratings=None
    )
    order = np.argsort(users, kind="stable")
    place = np.empty(len(users), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=n_users))])
    place[order] = np.arange(len(users)) - starts[users[order]]
    parts = [interactions.take(mask) for mask in (place >= 2, place == 0, place == 1)]
    vectors = {
        name: torch.from_numpy(rng.standard_normal((n_items, width), dtype=np.float32))
        for name, width in (("image", dim), ("text", dim + 2))
    }
    present = {
        "image": torch.from_numpy(rng.random(n_items) > 0.1),
        "text": torch.ones(n_items, dtype=torch.bool),
    }
    return World(interactions, Split(*parts, rule="random_world"), FeatureTable(vectors, present))


def interactions_of(
    pairs: list[tuple[int, int]], n_users: int, n_items: int, timestamps: list[int] | None = None
) -> Interactions:
    """Interactions from a list of (user, item)."""
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    times = None if timestamps is None else np.array(timestamps, dtype=np.int64)
    return Interactions(table[:, 0], table[:, 1], n_users, n_items, times)
