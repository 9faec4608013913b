from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.lgmrec import LgmRec, LgmRecConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references.plain_graphs import user_item_matrix
from tests.references.plain_lgmrec import PlainLgmRec


@pytest.mark.parametrize(
    ("modalities", "contrast_with"),
    [(("text",), "all"), (("image", "text"), "batch"), (("image", "text", "sound"), "all")],
)
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...], contrast_with: str) -> None:
    world = tiny_world(*modalities)
    shared = {"n_layers": 2, "n_modality_layers": 1, "n_hyper_layers": 2, "alpha": 0.7, "temperature": 0.8}
    shared |= {"contrast_weight": 0.05, "contrast_with": contrast_with, "l2": 0.2}
    config = LgmRecConfig.model_validate({"dim": 4, "n_hyperedges": 3} | shared)
    model = LgmRec(world.split.train, world.features, config, np.random.default_rng(0))
    plain = PlainLgmRec(user_item_matrix(world.split.train), tables_of(world), **shared)
    final, _ = plain.parts(as_float64(model))
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(model, world, plain.loss, eval_mode=True)


def test_noise_and_dropout_are_for_training_alone() -> None:
    world = tiny_world("image", "text")
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    config = LgmRecConfig(dim=4, dropout=0.0)
    model = LgmRec(world.split.train, world.features, config, np.random.default_rng(0))
    calm = {float(model.eval().loss(batch, world.features).detach()) for _ in range(3)}
    drawn = {float(model.train().loss(batch, world.features).detach()) for _ in range(4)}
    assert len(calm) == 1
    assert len(drawn) > 1  # by the noise alone; two of the losses may happen to be the same
    scores = [model.scorer(world.features)(torch.arange(7)) for _ in range(2)]
    assert torch.equal(*scores)


def test_noise_picks_hyperedges_with_the_chances_of_a_softmax() -> None:
    """Gumbel-max: the largest of dependency + noise is edge a with chance softmax(dependencies)_a."""
    world = tiny_world("text")
    config = LgmRecConfig(dim=4, dropout=0.0, temperature=1e-3)
    model = LgmRec(world.split.train, world.features, config, np.random.default_rng(0))
    dependencies = torch.tensor([0.0, 1.0, 2.0]).repeat(40_000, 1)
    torch.manual_seed(0)
    picked = model._shares(dependencies, noisy=True).argmax(dim=1)
    shares = torch.bincount(picked, minlength=3) / len(picked)
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0), atol=0.01, rtol=0)
