from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.freedom import Freedom, FreedomConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_freedom
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.worlds import World

SHARES = {
    ("text",): {"text": 1.0},
    ("image", "text"): {"image": 0.2, "text": 0.8},
    ("image", "text", "fused"): {"image": 0.2, "text": 0.4, "fused": 0.4},
}
CONFIG = FreedomConfig(dim=3, k=3, image_share=0.2, feature_weight=0.7, l2=0.3)


def freedom(world: World, config: FreedomConfig = CONFIG) -> Freedom:
    return Freedom(world.split.train, world.features, config, np.random.default_rng(0))


def doubles(world: World) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    features = {name: table.double().numpy() for name, table in world.features.vectors.items()}
    return features, {name: mask.numpy() for name, mask in world.features.present.items()}


@pytest.mark.parametrize("modalities", SHARES)
def test_embeddings_and_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...]) -> None:
    world = tiny_world(*modalities)
    assert not world.features.present[modalities[0]].all()
    model = freedom(world)
    features, present = doubles(world)
    graph = plain_freedom.item_graph(features, present, SHARES[modalities], k=3)
    adjacency = bipartite(user_item_matrix(world.split.train))
    assert_embeddings_match(
        model, world, *plain_freedom.embeddings(as_float64(model), adjacency, graph, n_layers=2)
    )
    assert_two_steps_match(
        model,
        world,
        lambda p, _, batch: plain_freedom.loss(
            p, batch, adjacency, graph, features, n_layers=2, feature_weight=0.7, l2=0.3
        ),
    )


def test_an_epoch_trains_on_a_part_of_the_pairs_and_scores_on_all() -> None:
    world = tiny_world("image", "text")
    model = freedom(world, replace_in(CONFIG, edge_dropout=0.4, feature_weight=0.0, l2=0.0))
    before = [part.detach() for part in model(world.features)]
    torch.manual_seed(0)
    model.start_epoch(world.features)
    torch.manual_seed(0)
    of_user, of_item = model.graph.degrees()
    chances = (of_user[model.graph.users] * of_item[model.graph.items]).float().rsqrt()
    kept = model.graph.sample(int(0.6 * len(model.graph)), chances).numpy()
    matrix = np.zeros((7, 9))
    matrix[model.graph.users[kept], model.graph.items[kept]] = 1
    features, present = doubles(world)
    graph = plain_freedom.item_graph(features, present, SHARES["image", "text"], k=3)
    batch = (world.split.train.user_rows[:4], world.split.train.item_rows[:4], np.full((4, 1), 8))
    expected = plain_freedom.loss(
        as_float64(model), batch, bipartite(matrix), graph, {}, n_layers=2, feature_weight=0, l2=0
    )
    found = model.loss(Batch(*(torch.from_numpy(rows) for rows in batch)), world.features)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    for part, again in zip(before, model(world.features), strict=True):
        torch.testing.assert_close(again, part)


def test_the_item_graph_is_frozen_while_rows_are_live_until_it_is_refreshed() -> None:
    world = tiny_world("image", "text")
    model = freedom(world).train()
    frozen = [part.detach() for part in model(world.features)]
    other = tiny_world("text", "image").features
    moved = {
        name: other.vectors[name].new_tensor(np.roll(table.numpy(), 2, axis=0)).requires_grad_()
        for name, table in world.features.vectors.items()
    }
    live = FeatureTable(moved, world.features.present)
    torch.testing.assert_close(model(live)[1], frozen[1])
    model.refresh_graph(live)
    refreshed = model(live)[1].detach()
    assert not torch.allclose(refreshed, frozen[1])
    constant = replace(live, vectors={name: table.detach() for name, table in moved.items()})
    torch.testing.assert_close(
        freedom(World(world.interactions, world.split, constant))(constant)[1], refreshed
    )


def test_a_measurement_on_other_features_does_not_change_the_training() -> None:
    world = tiny_world("image", "text")
    model = freedom(world)
    rolled = {name: table.roll(2, 0) for name, table in world.features.vectors.items()}
    others = FeatureTable(rolled, world.features.present)
    before = model._kept
    scores = model.eval()(others)[1]
    assert model._kept is before
    torch.testing.assert_close(freedom(World(world.interactions, world.split, others))(others)[1], scores)


def replace_in(config: FreedomConfig, **changes: float) -> FreedomConfig:
    return config.model_copy(update=changes)
