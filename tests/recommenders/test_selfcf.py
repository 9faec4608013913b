from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.selfcf import SelfCf, SelfCfConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_two_steps_match, tiny_world
from tests.references import plain_selfcf
from tests.references.plain_graphs import bipartite, user_item_matrix

NOTHING = FeatureTable()


def model_of(**settings: float | str) -> SelfCf:
    config = SelfCfConfig.model_validate({"dim": 3} | settings)
    return SelfCf(tiny_world().split.train, NOTHING, config, np.random.default_rng(0))


def test_two_training_steps_match_the_plain_loss() -> None:
    model = model_of(n_layers=2, l2=0.3)
    world = tiny_world()
    adjacency = bipartite(user_item_matrix(world.split.train))
    scores = model.scorer(NOTHING)(torch.arange(7))
    np.testing.assert_allclose(scores, plain_selfcf.score(as_float64(model), adjacency, 7, 2), rtol=1e-4)
    assert_two_steps_match(
        model,
        world,
        lambda p, stopped, batch: plain_selfcf.loss(p, stopped, batch, adjacency, adjacency, 7, 2, 0.3),
        eval_mode=True,
    )


def test_the_view_to_predict_may_come_from_a_pruned_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(n_layers=2, l2=0.3, perturbation="edges", dropout=0.4)
    world = tiny_world()
    matrix = user_item_matrix(world.split.train)
    torch.manual_seed(0)
    kept = model.graph.sample(round(0.6 * len(model.graph)))
    pruned = np.zeros_like(matrix)
    pruned[model.graph.users[kept], model.graph.items[kept]] = 1
    monkeypatch.setattr(model.graph, "sample", lambda n_kept: kept)
    assert_two_steps_match(
        model,
        world,
        lambda p, stopped, batch: plain_selfcf.loss(
            p, stopped, batch, bipartite(matrix), bipartite(pruned), 7, 2, 0.3
        ),
    )


@pytest.mark.parametrize("perturbation", ["embeddings", "edges"])
def test_views_are_perturbed_only_while_training(perturbation: str) -> None:
    model = model_of(perturbation=perturbation, dropout=0.5)
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    calm = {float(model.eval().loss(batch, NOTHING).detach()) for _ in range(3)}
    drawn = {float(model.train().loss(batch, NOTHING).detach()) for _ in range(8)}
    assert len(calm) == 1
    assert len(drawn) > 1
