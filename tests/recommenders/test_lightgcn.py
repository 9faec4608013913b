from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.lightgcn import LightGcn, LightGcnConfig
from tests.recommenders.steps import as_float64, train_two_steps
from tests.references.plain_lightgcn import propagate, train_lightgcn
from tests.worlds import interactions_of, random_world


def test_two_training_steps_match_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    world = random_world(n_users=7, n_items=9)
    train = world.split.train
    config = LightGcnConfig(dim=3, n_layers=2, l2=0.3)
    model = LightGcn(train, world.features, config, np.random.default_rng(0))
    embeddings = as_float64(model)["embeddings"]
    batches, losses = train_two_steps(model, world, monkeypatch, learning_rate=0.7)
    pairs = list(zip(train.user_rows, train.item_rows, strict=True))
    expected = train_lightgcn(embeddings, pairs, 7, batches, learning_rate=0.7, l2=0.3, n_layers=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(as_float64(model)["embeddings"], embeddings, rtol=1e-4, atol=1e-6)


def test_embeddings_are_the_mean_over_layers_of_eq_3() -> None:
    world = random_world(n_users=7, n_items=9)
    train = world.split.train
    model = LightGcn(train, FeatureTable(), LightGcnConfig(dim=3, n_layers=3), np.random.default_rng(0))
    pairs = list(zip(train.user_rows, train.item_rows, strict=True))
    expected = propagate(pairs, 7, as_float64(model)["embeddings"], 3)
    users, items = model(FeatureTable())
    np.testing.assert_allclose(torch.cat([users, items]).detach(), expected, rtol=1e-5, atol=1e-7)


def test_an_item_nobody_took_keeps_its_own_share_of_the_mean() -> None:
    train = interactions_of([(0, 0), (1, 0)], n_users=2, n_items=2)
    model = LightGcn(train, FeatureTable(), LightGcnConfig(dim=4, n_layers=3), np.random.default_rng(0))
    _, items = model(FeatureTable())
    torch.testing.assert_close(items[1], model.embeddings[3] / 4)


def test_the_graph_is_not_in_the_state_that_is_saved() -> None:
    world = random_world(n_users=7, n_items=9)
    model = LightGcn(world.split.train, FeatureTable(), LightGcnConfig(dim=3), np.random.default_rng(0))
    assert list(model.state_dict()) == ["embeddings"]
