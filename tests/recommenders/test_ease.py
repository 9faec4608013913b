from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.errors import RecommenderError
from recommenders.feature_input import FeatureTable
from recommenders.models.ease import Ease, EaseConfig
from tests.worlds import World, random_world


def model_of(world: World, **settings: float) -> Ease:
    config = EaseConfig.model_validate(settings)
    return Ease(world.split.train, FeatureTable(), config, np.random.default_rng(0))


@pytest.mark.parametrize("l2", [0.5, 200.0])
def test_scores_match_eq_8_on_dense_matrices(l2: float) -> None:
    world = random_world(n_users=15, n_items=11)
    x = world.split.train.csr().toarray().astype(np.float64)
    p = np.linalg.inv(x.T @ x + l2 * np.eye(11))
    b = np.eye(11) - p / np.diag(p)
    scores = model_of(world, l2=l2).scorer(FeatureTable())(torch.arange(15))
    np.testing.assert_allclose(scores, x @ b, rtol=1e-4, atol=1e-6)


def test_the_weights_minimise_the_squared_error_among_those_without_a_diagonal() -> None:
    """The objective of eq. 1, not its solution: each item regressed on all others, with a ridge."""
    world = random_world(n_users=15, n_items=11)
    x = world.split.train.csr().toarray().astype(np.float64)
    weights = model_of(world, l2=3.0).weights.numpy()
    for item in range(11):
        others = np.arange(11) != item
        z = x[:, others]
        ridge = np.linalg.solve(z.T @ z + 3.0 * np.eye(10), z.T @ x[:, item])
        np.testing.assert_allclose(weights[others, item], ridge, rtol=1e-4, atol=1e-6)
        assert weights[item, item] == 0


def test_a_user_without_history_scores_all_items_alike() -> None:
    world = random_world(n_users=9, n_items=11)
    train = world.split.train.take(world.split.train.user_rows != 4)
    model = Ease(train, FeatureTable(), EaseConfig(), np.random.default_rng(0))
    scores = model.scorer(FeatureTable())(torch.tensor([4, 3, 4, 8]))
    assert scores[[0, 2]].abs().max() == 0
    assert torch.equal(scores[1], model.scorer(FeatureTable())(torch.tensor([3]))[0])


def test_more_items_than_max_items_are_refused_with_the_memory_they_need() -> None:
    world = random_world(n_users=9, n_items=50)
    message = r"50 items take 0\.0 GB; max_items allows 49 items.*itemknn"
    with pytest.raises(RecommenderError, match=message):
        model_of(world, max_items=49)
    model_of(world, max_items=50)
