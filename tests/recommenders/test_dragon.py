from __future__ import annotations

import numpy as np
import pytest

from recommenders.item_graphs import modality_shares
from recommenders.models.dragon import Dragon, DragonConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    masks_of,
    tables_of,
    tiny_world,
)
from tests.references import plain_dualgnn
from tests.references.plain_graphs import user_item_matrix


@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...]) -> None:
    world = tiny_world(*modalities)
    config = DragonConfig(
        dim=3, hidden_dim=4, n_layers=1, n_item_layers=2, k=3, image_share=0.3, n_neighbours=3, l2=0.2
    )
    model = Dragon(world.split.train, world.features, config, np.random.default_rng(0))
    matrix, tables = user_item_matrix(world.split.train), tables_of(world)
    graph = plain_dualgnn.blended(tables, masks_of(world), modality_shares(modalities, 0.3), 3)

    def embed(p):
        return plain_dualgnn.dragon(p, matrix, tables, graph, 1, 2, 3)

    assert_embeddings_match(model, world, *embed(as_float64(model)))
    assert_two_steps_match(
        model, world, lambda p, _, batch: plain_dualgnn.loss(p, *embed(p), list(tables), batch, 0.2)
    )
