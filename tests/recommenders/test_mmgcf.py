from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.mmgcf import Mmgcf, MmgcfConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    tables_of,
    tiny_world,
)
from tests.references import plain_mmgcf
from tests.references.plain_graphs import user_item_matrix
from tests.worlds import World


def mmgcf(world: World, **settings: object) -> Mmgcf:
    config = MmgcfConfig.model_validate({"dim": 3, "n_layers": 2, "l2": 0.3, **settings})
    return Mmgcf(world.split.train, world.features, config, np.random.default_rng(0))


@pytest.mark.parametrize("weighting", ["equal", "learned", "normalised"])
@pytest.mark.parametrize(
    ("modalities", "fusion"),
    [
        (("text",), "concatenation"),
        (("image", "text"), "concatenation"),
        (("image", "text"), "mean"),
        (("image", "text", "sound"), "sum"),
    ],
)
def test_two_training_steps_match_the_plain_loss(
    modalities: tuple[str, ...], fusion: str, weighting: str
) -> None:
    world = tiny_world(*modalities)
    model = mmgcf(world, fusion=fusion, weighting=weighting)
    matrix = user_item_matrix(world.split.train)

    def embeddings(p):
        return plain_mmgcf.embeddings(p, matrix, tables_of(world), 2, fusion, weighting)

    assert_embeddings_match(model, world, *embeddings(as_float64(model)))
    assert_two_steps_match(model, world, lambda p, _, batch: plain_mmgcf.loss(p, embeddings(p), batch, 0.3))


@pytest.mark.parametrize("weighting", ["equal", "learned", "normalised"])
@pytest.mark.parametrize("fusion", ["mean", "sum", "concatenation"])
def test_every_kind_of_fusion_uses_all_its_parameters(fusion: str, weighting: str) -> None:
    world = tiny_world("image", "text")
    model = mmgcf(world, fusion=fusion, weighting=weighting, l2=0)
    batch = Batch(torch.arange(6), torch.arange(6), torch.arange(3, 9)[:, None])
    model.loss(batch, world.features).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


def test_an_epoch_trains_on_a_part_of_the_pairs_and_scores_on_all() -> None:
    world = tiny_world("image", "text")
    model = mmgcf(world, edge_dropout=0.4)
    before = [part.detach() for part in model(world.features)]
    torch.manual_seed(0)
    model.start_epoch(world.features)
    torch.manual_seed(0)
    of_user, of_item = model.graph.degrees()
    chances = (of_user[model.graph.users] * of_item[model.graph.items]).float().rsqrt()
    kept = model.graph.sample(int(0.6 * len(model.graph)), chances).numpy()
    matrix = np.zeros((7, 9))
    matrix[model.graph.users[kept], model.graph.items[kept]] = 1
    batch = (world.split.train.user_rows[:4], world.split.train.item_rows[:4], np.full((4, 1), 8))
    parameters = as_float64(model)
    final = plain_mmgcf.embeddings(parameters, matrix, tables_of(world), 2, "mean", "equal")
    found = model.loss(Batch(*(torch.from_numpy(rows) for rows in batch)), world.features)
    assert float(found.detach()) == pytest.approx(plain_mmgcf.loss(parameters, final, batch, 0.3), rel=1e-4)
    for part, again in zip(before, model(world.features), strict=True):
        torch.testing.assert_close(again, part)


def test_a_modality_that_an_item_lacks_adds_nothing() -> None:
    world = tiny_world("image", "text")
    assert not world.features.present["image"][0]
    model = mmgcf(world, fusion="sum")
    before = model(world.features)[1][0].detach()
    with torch.no_grad():
        model.projections["image"].weight.add_(1)
    torch.testing.assert_close(model(world.features)[1][0], before)
