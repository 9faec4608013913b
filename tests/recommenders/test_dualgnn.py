from __future__ import annotations

import numpy as np
import pytest

from recommenders.models.dualgnn import DualGnn, DualGnnConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references import plain_dualgnn
from tests.references.plain_graphs import user_item_matrix


@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...]) -> None:
    world = tiny_world(*modalities)
    config = DualGnnConfig(dim=3, hidden_dim=4, n_layers=2, n_neighbours=3, l2=0.2)
    model = DualGnn(world.split.train, world.features, config, np.random.default_rng(0))
    matrix, tables = user_item_matrix(world.split.train), tables_of(world)
    assert_embeddings_match(model, world, *plain_dualgnn.dualgnn(as_float64(model), matrix, tables, 2, 3))
    assert_two_steps_match(
        model,
        world,
        lambda p, _, batch: plain_dualgnn.loss(
            p, *plain_dualgnn.dualgnn(p, matrix, tables, 2, 3), list(tables), batch, 0.2
        ),
    )


def test_a_users_modality_weights_start_positive_and_add_up_to_1() -> None:
    world = tiny_world("image", "text", "sound")
    model = DualGnn(world.split.train, world.features, DualGnnConfig(), np.random.default_rng(0))
    weights = as_float64(model)["weights"]
    assert weights.shape == (7, 3)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
