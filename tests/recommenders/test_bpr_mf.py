from __future__ import annotations

import numpy as np
import pytest

from recommenders.models.bpr_mf import BprMf, BprMfConfig
from tests.recommenders.steps import as_float64, train_two_steps
from tests.references.plain_bpr import train_bpr
from tests.worlds import random_world


@pytest.mark.parametrize("item_bias", [False, True])
def test_two_training_steps_match_the_plain_loop(item_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    world = random_world(n_users=7, n_items=9)
    model = BprMf(
        world.split.train,
        world.features,
        BprMfConfig(dim=3, l2=0.3, item_bias=item_bias),
        np.random.default_rng(0),
    )
    before = as_float64(model)
    bias = before.get("item_bias", np.zeros(9))
    batches, losses = train_two_steps(model, world, monkeypatch, learning_rate=0.7)
    expected = train_bpr(
        before["users"], before["items"], bias, batches, learning_rate=0.7, l2=0.3, learns_bias=item_bias
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    after = as_float64(model)
    np.testing.assert_allclose(after["users"], before["users"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["items"], before["items"], rtol=1e-4, atol=1e-6)
    if item_bias:
        assert np.abs(bias).max() > 0.01
        np.testing.assert_allclose(after["item_bias"], bias, rtol=1e-4, atol=1e-6)


def test_the_item_bias_is_off_unless_asked_for() -> None:
    world = random_world(n_users=7, n_items=9)
    model = BprMf(world.split.train, world.features, BprMfConfig(dim=3), np.random.default_rng(0))
    assert [name for name, _ in model.named_parameters()] == ["users", "items"]
    users, items = model(world.features)
    assert users.shape == (7, 3)
    assert items.shape == (9, 3)
