"""Models that draw numbers or choose neighbours while they train go on from a checkpoint exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recommenders.models.base import Recommender
from recommenders.models.registry import build_model
from tests.recommenders.trainings import FAST, KilledError, assert_same_state, run, without_seconds
from tests.worlds import World, random_world

DRAWING = {
    "damrs": {"dim": 4, "n_positives": 3},
    "freedom": {"dim": 4, "k": 4, "edge_dropout": 0.5},
    "lattice": {"dim": 4, "feature_dim": 3, "k": 4},
    "mmgcn": {"dim": 4, "latent_dim": 3},
    "mmgcf": {"dim": 4},
    "mmgcl": {"dim": 4},
    "mvgae": {"dim": 4, "latent_dim": 5},
    "slmrec": {"dim": 4, "task": "fd+fm"},
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_training_killed_after_epoch_2_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    world = random_world(n_users=20, n_items=25)
    config = FAST.model_copy(update={"epochs": 4})

    def build(world: World) -> Recommender:
        rng = np.random.default_rng(0)
        return build_model(name, DRAWING[name], world.split.train, world.features, rng)

    whole = build(world)
    expected = run(whole, world, config)

    def die(done: int, total: int) -> None:
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(build(world), world, config, tmp_path, progress=die)
    resumed = build(world)
    result = run(resumed, world, config, tmp_path)
    assert result.resumed_after == 2
    assert without_seconds(result) == without_seconds(expected)
    assert_same_state(resumed, whole)
