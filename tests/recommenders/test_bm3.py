from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.bm3 import Bm3, Bm3Config
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references import plain_bm3
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.worlds import World


def model_of(world: World, **settings: float) -> Bm3:
    config = Bm3Config.model_validate({"dim": 3} | settings)
    return Bm3(world.split.train, world.features, config, np.random.default_rng(0))


@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...]) -> None:
    world = tiny_world(*modalities)
    model = model_of(world, n_layers=2, modality_weight=0.7, l2=0.3)
    adjacency, tables = bipartite(user_item_matrix(world.split.train)), tables_of(world)
    parameters = as_float64(model)
    users, items = plain_bm3.hidden(parameters, adjacency, 7, 2)
    assert_embeddings_match(
        model, world, plain_bm3.predict(parameters, users), plain_bm3.predict(parameters, items)
    )
    assert_two_steps_match(
        model,
        world,
        lambda p, stopped, batch: plain_bm3.loss(p, stopped, batch, tables, adjacency, 7, 2, 0.7, 0.3),
        eval_mode=True,
    )


def test_only_the_contrastive_views_are_dropped_out_and_only_while_training() -> None:
    world = tiny_world("image")
    model = model_of(world, dropout=0.5)
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    calm = {float(model.eval().loss(batch, world.features).detach()) for _ in range(3)}
    drawn = {float(model.train().loss(batch, world.features).detach()) for _ in range(8)}
    assert len(calm) == 1
    assert len(drawn) > 1
    scores = [model.scorer(world.features)(torch.arange(7)) for _ in range(2)]
    assert torch.equal(*scores)


def test_negatives_change_nothing() -> None:
    world = tiny_world("image")
    model = model_of(world).eval()
    users, positives = torch.tensor([0, 1]), torch.tensor([2, 3])
    losses = [
        model.loss(Batch(users, positives, torch.tensor(negatives)), world.features)
        for negatives in ([[4], [5]], [[6], [7]])
    ]
    assert torch.equal(*losses)
