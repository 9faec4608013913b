from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.mvgae import Mvgae, MvgaeConfig, product_of_experts
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references.plain_graphs import user_item_matrix
from tests.references.plain_mvgae import PlainMvgae
from tests.worlds import World

SHARED = {"n_layers": 1, "squash": True, "beta": 0.7, "expert_weight": 0.4, "l2": 0.3}
BATCH = Batch(torch.tensor([0, 2, 2]), torch.tensor([1, 4, 1]), torch.tensor([[3, 4], [5, 0], [0, 0]]))


def both(world: World, **settings: object) -> tuple[Mvgae, PlainMvgae]:
    shared = SHARED | {name: value for name, value in settings.items() if name in SHARED}
    config = MvgaeConfig.model_validate({"dim": 3, "latent_dim": 2, **shared, **settings})
    model = Mvgae(world.split.train, world.features, config, np.random.default_rng(0))
    return model, PlainMvgae(user_item_matrix(world.split.train), tables_of(world), **shared)


@pytest.mark.parametrize(
    ("modalities", "n_layers", "squash"),
    [(("text",), 2, False), (("image", "text"), 1, True), (("image", "text", "sound"), 0, True)],
)
def test_two_training_steps_match_the_plain_loss(
    modalities: tuple[str, ...], n_layers: int, squash: bool
) -> None:
    world = tiny_world(*modalities)
    model, plain = both(world, n_layers=n_layers, squash=squash)
    final = plain.final(as_float64(model))
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(model, world, lambda p, _, batch: plain.loss(p, batch), eval_mode=True)


def test_embeddings_are_drawn_from_their_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny_world("image", "text")
    model, plain = both(world, dropout=0.0, noise=0.3)
    monkeypatch.setattr(torch, "randn_like", lambda table: torch.full_like(table, -1.5))
    found = model.train().loss(BATCH, world.features)
    batch = tuple(part.numpy() for part in (BATCH.users, BATCH.positives, BATCH.negatives))
    expected = plain.loss(as_float64(model), batch, deviation=-1.5 * 0.3)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(plain.loss(as_float64(model), batch), rel=1e-4)


@pytest.mark.parametrize("settings", [{"noise": 0.0}, {"dropout": 0.0}], ids=["dropout", "noise"])
def test_noise_and_dropout_are_for_training_alone(settings: dict[str, float]) -> None:
    world = tiny_world("image", "text")
    model, _ = both(world, **settings)
    assert len({float(model.eval().loss(BATCH, world.features).detach()) for _ in range(3)}) == 1
    assert len({float(model.train().loss(BATCH, world.features).detach()) for _ in range(4)}) > 1


def test_a_product_of_gaussians_trusts_the_one_that_is_sure() -> None:
    means = torch.tensor([[1.0]]), torch.tensor([[5.0]])
    variances = torch.tensor([[1.0]]), torch.tensor([[0.25]])
    experts = [(mean, variance.log()) for mean, variance in zip(means, variances, strict=True)]
    mean, log_variance = product_of_experts(experts)
    assert float(mean) == pytest.approx((1 / 1 + 5 / 0.25) / (1 + 4))
    assert float(log_variance.exp()) == pytest.approx(1 / 5)
    sure = [
        (torch.tensor([[2.0]]), torch.tensor([[-200.0]])),
        (torch.tensor([[9.0]]), torch.tensor([[200.0]])),
    ]
    assert float(product_of_experts(sure)[0]) == 2
    alone = product_of_experts(experts[:1])
    torch.testing.assert_close(alone, experts[0])


def test_a_large_variance_stays_finite() -> None:
    world = tiny_world("text")
    model, _ = both(world)
    with torch.no_grad():
        model.id_expert.get_parameter("heads.log_variance.mix.bias").fill_(500)
    loss = model.loss(BATCH, world.features)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
