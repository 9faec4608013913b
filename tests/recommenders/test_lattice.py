from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.lattice import Lattice, LatticeConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_lattice
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.worlds import World

CONFIG = LatticeConfig(dim=3, feature_dim=4, k=3, initial_share=0.4, l2=0.3)


def lattice(world: World, config: LatticeConfig = CONFIG) -> Lattice:
    model = Lattice(world.split.train, world.features, config, np.random.default_rng(0))
    with (
        torch.no_grad()
    ):  # the biases and the weights of graphs start at 0; numbers there make a test see them
        for bias in model.biases.values():
            bias.copy_(torch.linspace(-1, 1, len(bias)))
        if model.importance is not None:
            model.importance.copy_(torch.linspace(-1, 1, len(model.importance)))
    model.start_epoch(world.features)
    return model


def doubles(world: World) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    features = {name: table.double().numpy() for name, table in world.features.vectors.items()}
    return features, {name: mask.numpy() for name, mask in world.features.present.items()}


@pytest.mark.parametrize("backbone", ["lightgcn", "mf"])
@pytest.mark.parametrize("modalities", [("text",), ("image", "text"), ("image", "text", "fused")])
def test_embeddings_and_two_training_steps_match_the_plain_loss(
    modalities: tuple[str, ...], backbone: str
) -> None:
    world = tiny_world(*modalities)
    assert not world.features.present[modalities[0]].all()
    model = lattice(world, CONFIG.model_copy(update={"backbone": backbone}))
    features, present = doubles(world)
    chosen = plain_lattice.chosen_now(as_float64(model), features, present, k=3)
    adjacency = bipartite(user_item_matrix(world.split.train))

    def embeddings(p):
        return plain_lattice.embeddings(
            p,
            adjacency,
            features,
            present,
            chosen,
            k=3,
            initial_share=0.4,
            n_layers=2 if backbone == "lightgcn" else 0,
        )

    assert_embeddings_match(model, world, *embeddings(as_float64(model)))
    assert_two_steps_match(
        model, world, lambda p, _, batch: plain_lattice.loss(*embeddings(p), batch, l2=0.3)
    )


def test_neighbours_are_chosen_anew_at_an_epoch_and_for_a_ranking_but_not_within_an_epoch() -> None:
    world = tiny_world("image", "text")
    model = lattice(world).train()
    features, present = doubles(world)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, fused=True)
    before = model._learned
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    model.loss(batch, world.features).backward()
    optimizer.step()
    model.loss(batch, world.features)
    assert model._learned is before
    adjacency = bipartite(user_item_matrix(world.split.train))
    now = as_float64(model)
    chosen = plain_lattice.chosen_now(now, features, present, k=3)
    expected = plain_lattice.embeddings(
        now, adjacency, features, present, chosen, k=3, initial_share=0.4, n_layers=2
    )
    assert_embeddings_match(model, world, *expected)
    after = model._learned
    assert after is not before
    model.start_epoch(world.features)
    assert model._learned is after


def test_as_the_authors_train_only_the_first_batch_of_an_epoch_changes_the_graph() -> None:
    world = tiny_world("image", "text")
    model = lattice(world, CONFIG.model_copy(update={"graph_gradient": "first_batch"})).train()
    batch = Batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]]))
    projection = model.projections["text"]
    for _ in range(2):
        model.start_epoch(world.features)
        projection.grad = None
        model.loss(batch, world.features).backward()
        assert projection.grad is not None
        assert projection.grad.abs().max() > 0
        projection.grad = None
        model.loss(batch, world.features).backward()
        assert projection.grad is None


def test_live_rows_get_gradient_through_the_learned_graph_and_leave_the_given_one_as_it_is() -> None:
    world = tiny_world("image", "text")
    model = lattice(world).train()
    live = {name: table.clone().requires_grad_() for name, table in world.features.vectors.items()}
    given = model._given
    batch = Batch(torch.arange(4), torch.arange(4), torch.arange(4, 8)[:, None])
    table = FeatureTable(live, world.features.present)
    model.start_epoch(table)
    model.loss(batch, table).backward()
    assert model._given is given
    for name, vectors in live.items():
        assert vectors.grad is not None
        reached = vectors.grad.abs().sum(dim=1) > 0
        assert torch.equal(reached[:8], world.features.present[name][:8])
