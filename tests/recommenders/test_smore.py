from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.smore import Smore, SmoreConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    masks_of,
    tables_of,
    tiny_world,
)
from tests.references.plain_graphs import user_item_matrix
from tests.references.plain_smore import PlainSmore


@pytest.mark.parametrize("dim", [3, 4])
@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "sound")])
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...], dim: int) -> None:
    world = tiny_world(*modalities)
    shared = {"n_layers": 2, "k": 3, "image_k": 4, "temperature": 0.4, "contrast_weight": 0.3, "l2": 0.2}
    config = SmoreConfig.model_validate({"dim": dim} | shared)
    model = Smore(world.split.train, world.features, config, np.random.default_rng(0))
    plain = PlainSmore(user_item_matrix(world.split.train), tables_of(world), masks_of(world), **shared)
    final = sum(plain.parts(as_float64(model)))
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(model, world, plain.loss)


def test_preferences_are_dropped_out_only_while_training() -> None:
    world = tiny_world("image")
    config = SmoreConfig(dim=4, k=3, preference_dropout=0.5)
    model = Smore(world.split.train, world.features, config, np.random.default_rng(0))
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    calm = {float(model.eval().loss(batch, world.features).detach()) for _ in range(3)}
    drawn = {float(model.train().loss(batch, world.features).detach()) for _ in range(8)}
    assert len(calm) == 1
    assert len(drawn) > 1
