from __future__ import annotations

import numpy as np
import pytest

from recommenders.models.mgcn import Mgcn, MgcnConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    masks_of,
    tables_of,
    tiny_world,
)
from tests.references.plain_graphs import user_item_matrix
from tests.references.plain_mgcn import PlainMgcn


@pytest.mark.parametrize(
    ("modalities", "fuser"),
    [(("text",), "paper"), (("image", "text"), "released"), (("image", "text", "sound"), "paper")],
)
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...], fuser: str) -> None:
    world = tiny_world(*modalities)
    shared = {
        "n_layers": 2,
        "n_item_layers": 2,
        "k": 3,
        "temperature": 0.4,
        "contrast_weight": 0.3,
        "l2": 0.2,
    }
    config = MgcnConfig.model_validate({"dim": 3, "fuser": fuser} | shared)
    model = Mgcn(world.split.train, world.features, config, np.random.default_rng(0))
    plain = PlainMgcn(
        user_item_matrix(world.split.train),
        tables_of(world),
        masks_of(world),
        released_fuser=fuser == "released",
        **shared,
    )
    final = sum(plain.parts(as_float64(model)))
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(model, world, plain.loss)
