from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.grcn import Grcn, GrcnConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references import plain_grcn
from tests.references.plain_graphs import user_item_matrix


@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...]) -> None:
    world = tiny_world(*modalities)
    config = GrcnConfig(dim=3, content_dim=2, n_routings=2, n_layers=2, l2=0.2)
    model = Grcn(world.split.train, world.features, config, np.random.default_rng(0))
    matrix, tables = user_item_matrix(world.split.train), tables_of(world)

    def embed(p):
        return plain_grcn.embed(p, matrix, tables, 2, 2)

    assert_embeddings_match(model, world, *embed(as_float64(model)))
    assert_two_steps_match(
        model, world, lambda p, _, batch: plain_grcn.loss(p, *embed(p), list(tables), batch, 0.2)
    )


def test_a_sender_without_confidence_is_pruned() -> None:
    world = tiny_world("text")
    model = Grcn(world.split.train, world.features, GrcnConfig(dim=3), np.random.default_rng(0))
    with torch.no_grad():
        model.confidence.fill_(-1)
        users, _ = model(world.features)
    own = torch.nn.functional.normalize(model.embeddings[:7], dim=1)
    torch.testing.assert_close(users[:, :3], own)
