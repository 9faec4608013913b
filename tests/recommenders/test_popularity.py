from __future__ import annotations

import numpy as np
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.popularity import Popularity, PopularityConfig
from tests.worlds import interactions_of, random_world


def test_scores_are_counts_of_training_pairs_and_the_same_for_all_users() -> None:
    train = random_world(n_users=12, n_items=9).split.train
    model = Popularity(train, FeatureTable(), PopularityConfig(), np.random.default_rng(0))
    scores = model.scorer(FeatureTable())(torch.arange(12))
    for user in range(12):
        for item in range(9):
            assert scores[user, item] == sum(other == item for other in train.item_rows)


def test_a_repeated_pair_counts_each_time() -> None:
    train = interactions_of([(0, 1), (0, 1), (1, 0)], n_users=2, n_items=3)
    model = Popularity(train, FeatureTable(), PopularityConfig(), np.random.default_rng(0))
    assert model.scorer(FeatureTable())(torch.tensor([1])).tolist() == [[1, 2, 0]]
