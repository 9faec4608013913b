from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.slmrec import Slmrec, SlmrecConfig
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_slmrec
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.references.plain_modality_encoder import embeddings, inputs, propagated
from tests.worlds import World

CONFIG = SlmrecConfig(
    dim=3, n_layers=2, temperature=0.6, ssl_weight=0.5, ssl_temperature=0.7, dropout=0.4, l2=0.3
)


def slmrec(world: World, **changes: object) -> Slmrec:
    config = CONFIG.model_copy(update=changes)
    return Slmrec(world.split.train, world.features, config, np.random.default_rng(0))


def doubles(world: World) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    features = {name: table.double().numpy() for name, table in world.features.vectors.items()}
    return bipartite(user_item_matrix(world.split.train)), features


@pytest.mark.parametrize(
    ("modalities", "main_loss", "cosine"),
    [
        (("text",), "infonce", True),
        (("image", "text"), "bpr", False),
        (("image", "text", "fused"), "infonce", True),
    ],
)
def test_fine_and_coarse_matches_the_plain_loss_in_two_training_steps(
    modalities: tuple[str, ...], main_loss: str, cosine: bool
) -> None:
    world = tiny_world(*modalities)
    model = slmrec(world, main_loss=main_loss, cosine=cosine)
    adjacency, features = doubles(world)
    assert_embeddings_match(model, world, *embeddings(as_float64(model), adjacency, features, 2))

    def plain(p, _, batch):
        parts = propagated(p, adjacency, inputs(p, features), 2)[1]
        contrast = plain_slmrec.fine_and_coarse(p, parts, np.unique(batch[1]), 0.7, cosine=cosine)
        options = {"n_layers": 2, "main_loss": main_loss, "temperature": 0.6, "ssl_weight": 0.5, "l2": 0.3}
        return plain_slmrec.loss(p, adjacency, features, batch, contrast, **options)

    assert_two_steps_match(model, world, plain, learning_rate=0.1)


def test_feature_masking_matches_the_plain_loss_in_two_training_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = tiny_world("image", "text")
    model = slmrec(world, task="fm")
    adjacency, features = doubles(world)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([2, 0, 1]))

    def plain(p, _, batch):
        contrast = plain_slmrec.masked_views(
            p, adjacency, features, batch, (2, 0), n_layers=2, temperature=0.7
        )
        options = {"n_layers": 2, "main_loss": "infonce", "temperature": 0.6, "ssl_weight": 0.5, "l2": 0.3}
        return plain_slmrec.loss(p, adjacency, features, batch, contrast, **options)

    assert_two_steps_match(model, world, plain, learning_rate=0.1)


@pytest.mark.parametrize("task", ["fd", "fm", "fd+fm"])
def test_views_are_drawn_anew_and_reach_every_parameter(task: str) -> None:
    world = tiny_world("image", "text")
    model = slmrec(world, task=task)
    batch = Batch(torch.arange(6), torch.arange(6), torch.arange(3, 9)[:, None])
    torch.manual_seed(0)
    first = model.loss(batch, world.features)
    assert {float(model.loss(batch, world.features).detach()) for _ in range(8)} != {float(first.detach())}
    first.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("task", ["fac", "fm"])
def test_features_smoothed_once_change_no_loss_and_no_gradient(n_layers: int, task: str) -> None:
    world = tiny_world("image", "text")
    batch = Batch(torch.tensor([0, 2, 2]), torch.tensor([1, 4, 1]), torch.tensor([[3], [5], [0]]))
    gradients = []
    for cache_mb in (0, 1):
        model = slmrec(world, cache_mb=cache_mb, n_layers=n_layers, task=task)
        torch.manual_seed(0)
        model.loss(batch, world.features).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_live_features_get_their_gradient_although_others_are_smoothed_once() -> None:
    world = tiny_world("image", "text")
    model = slmrec(world)
    tables = {name: table.clone().requires_grad_() for name, table in world.features.vectors.items()}
    batch = Batch(torch.tensor([0, 2]), torch.tensor([1, 4]), torch.tensor([[3], [5]]))
    model.loss(batch, FeatureTable(tables, world.features.present)).backward()
    assert all(table.grad is not None and table.grad.abs().max() > 0 for table in tables.values())
