from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.layergcn import LayerGcn, LayerGcnConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_layergcn
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.worlds import random_world

NOTHING = FeatureTable()


def test_two_training_steps_match_the_plain_loss() -> None:
    world = tiny_world()
    config = LayerGcnConfig(dim=3, n_layers=2, l2=0.3)
    model = LayerGcn(world.split.train, NOTHING, config, np.random.default_rng(0))
    adjacency = bipartite(user_item_matrix(world.split.train))
    final = plain_layergcn.refined(adjacency, as_float64(model)["embeddings"], 2)
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(
        model,
        world,
        lambda p, _, batch: plain_layergcn.loss(p, batch, adjacency, 7, 2, 0.3),
        learning_rate=2.0,
    )


def test_an_epoch_trains_on_the_pairs_it_kept_and_scores_on_all() -> None:
    world = tiny_world()
    config = LayerGcnConfig(dim=3, n_layers=2, pruned_share=0.3)
    model = LayerGcn(world.split.train, NOTHING, config, np.random.default_rng(0))
    torch.manual_seed(0)
    model.start_epoch(NOTHING)
    torch.manual_seed(0)
    of_user, of_item = model.graph.degrees()
    chances = (of_user[model.graph.users] * of_item[model.graph.items]).float().rsqrt()
    kept = model.graph.sample(model.n_kept, chances).numpy()
    assert kept.sum() == round(0.7 * len(kept))
    matrix = np.zeros((7, 9))
    matrix[model.graph.users[kept], model.graph.items[kept]] = 1
    x = as_float64(model)["embeddings"]
    expected = plain_layergcn.refined(bipartite(matrix), x, 2)
    users, items = model.train()(NOTHING)
    np.testing.assert_allclose(torch.cat([users, items]).detach(), expected, rtol=1e-4, atol=1e-6)
    whole = plain_layergcn.refined(bipartite(user_item_matrix(world.split.train)), x, 2)
    users, items = model.eval()(NOTHING)
    np.testing.assert_allclose(torch.cat([users, items]).detach(), whole, rtol=1e-4, atol=1e-6)


def test_pairs_between_the_popular_are_pruned_most() -> None:
    world = random_world(n_users=60, n_items=50, density=0.1)
    model = LayerGcn(world.split.train, NOTHING, LayerGcnConfig(pruned_share=0.5), np.random.default_rng(0))
    of_user, of_item = model.graph.degrees()
    products = (of_user[model.graph.users] * of_item[model.graph.items]).double()
    chances = products.rsqrt().float()
    kept = torch.stack([model.graph.sample(model.n_kept, chances) for _ in range(200)]).double().mean(dim=0)
    popular = products > products.median()
    assert kept[popular].mean() < kept[~popular].mean() - 0.1
    assert kept.mean() == pytest.approx(0.5, abs=0.01)


def test_nothing_is_pruned_where_the_share_is_zero() -> None:
    world = tiny_world()
    model = LayerGcn(world.split.train, NOTHING, LayerGcnConfig(pruned_share=0), np.random.default_rng(0))
    before = model.train()(NOTHING)
    model.start_epoch(NOTHING)
    assert all(torch.equal(a, b) for a, b in zip(before, model(NOTHING), strict=True))
