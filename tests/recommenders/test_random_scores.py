from __future__ import annotations

import numpy as np
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.random_scores import RandomScores, RandomScoresConfig
from tests.worlds import random_world


def scores_of(seed: int, n_users: int = 200, n_items: int = 300) -> torch.Tensor:
    train = random_world(n_users, n_items, density=0.02).split.train
    model = RandomScores(train, FeatureTable(), RandomScoresConfig(), np.random.default_rng(seed))
    return model.scorer(FeatureTable())(torch.arange(n_users))


def test_scores_are_uniform_on_0_to_1() -> None:
    scores = scores_of(0).double()
    assert scores.min() >= 0
    assert scores.max() < 1
    shares = torch.histc(scores, bins=10, min=0, max=1) / scores.numel()
    np.testing.assert_allclose(shares, 0.1, atol=0.005)


def test_neither_a_user_nor_an_item_is_favoured() -> None:
    scores = scores_of(0).double()
    for mean, length in ((scores.mean(dim=0), 200), (scores.mean(dim=1), 300)):
        deviation = (mean - 0.5) * (12 * length) ** 0.5  # about standard normal
        assert deviation.abs().max() < 4.5
        assert 0.8 < deviation.std() < 1.2


def test_users_next_to_each_other_and_other_seeds_agree_on_nothing() -> None:
    scores = scores_of(0).double()
    neighbours = np.corrcoef(scores[0], scores[1])[0, 1]
    seeds = np.corrcoef(scores.flatten(), scores_of(1).double().flatten())[0, 1]
    assert abs(neighbours) < 0.2
    assert abs(seeds) < 0.02
