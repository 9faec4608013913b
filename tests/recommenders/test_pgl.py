from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.item_graphs import modality_shares
from recommenders.models.pgl import Pgl, PglConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    masks_of,
    tables_of,
    tiny_world,
)
from tests.references import plain_dualgnn, plain_pgl
from tests.references.plain_graphs import bipartite, user_item_matrix


@pytest.mark.parametrize("subgraph", ["local", "global"])
@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...], subgraph: str) -> None:
    world = tiny_world(*modalities)
    settings = {"dim": 3, "k": 3, "image_share": 0.3, "kept_share": 0.6, "n_components": 3, "l2": 0.2}
    settings |= {"contrast_weight": 0.3, "temperature": 0.4, "dropout": 0.0, "subgraph": subgraph}
    config = PglConfig.model_validate(settings)
    model = Pgl(world.split.train, world.features, config, np.random.default_rng(0))
    matrix, tables = user_item_matrix(world.split.train), tables_of(world)
    graph = plain_dualgnn.blended(tables, masks_of(world), modality_shares(modalities, 0.3), 3)
    whole = bipartite(matrix)
    assert_embeddings_match(model, world, *plain_pgl.embed(as_float64(model), whole, tables, graph, 2))
    principal = plain_pgl.low_rank(matrix, 3)
    if subgraph == "local":
        torch.manual_seed(0)
        model.start_epoch(world.features)
        torch.manual_seed(0)
        of_user, of_item = model.graph.degrees()
        chances = (of_user[model.graph.users] * of_item[model.graph.items]).float().rsqrt()
        kept = model.graph.sample(round(0.6 * len(model.graph)), chances).numpy()
        drawn = np.zeros_like(matrix)
        drawn[model.graph.users[kept], model.graph.items[kept]] = 1
        principal = bipartite(drawn)
    assert_two_steps_match(
        model,
        world,
        lambda p, _, batch: plain_pgl.loss(
            p, *plain_pgl.embed(p, principal, tables, graph, 2), batch, 0.3, 0.4, 0.2
        ),
    )


def test_views_are_dropped_out_only_while_training() -> None:
    world = tiny_world("image")
    config = PglConfig(dim=4, k=3, dropout=0.5, contrast_weight=1.0)
    model = Pgl(world.split.train, world.features, config, np.random.default_rng(0))
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    calm = {float(model.eval().loss(batch, world.features).detach()) for _ in range(3)}
    drawn = {float(model.train().loss(batch, world.features).detach()) for _ in range(8)}
    assert len(calm) == 1
    assert len(drawn) > 1
