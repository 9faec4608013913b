from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.mmgcn import Mmgcn, MmgcnConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_mmgcn
from tests.references.plain_graphs import user_item_matrix


@pytest.mark.parametrize(
    ("modalities", "combination", "n_layers"),
    [
        (("text",), "concatenation", 1),
        (("image", "text"), "concatenation", 2),
        (("image", "text", "fused"), "sum", 2),
    ],
)
def test_embeddings_and_two_training_steps_match_the_plain_loss(
    modalities: tuple[str, ...], combination: str, n_layers: int
) -> None:
    world = tiny_world(*modalities)
    config = MmgcnConfig(dim=3, latent_dim=2, n_layers=n_layers, combination=combination, l2=0.3)
    model = Mmgcn(world.split.train, world.features, config, np.random.default_rng(0))
    with torch.no_grad():  # biases start at 0; numbers there make a test see them
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(-0.5, 1, len(parameter)))
            elif "preferences" in name:
                parameter.mul_(3)
    features = {name: table.double().numpy() for name, table in world.features.vectors.items()}
    mean = plain_mmgcn.mean_over_neighbours(user_item_matrix(world.split.train))

    def embeddings(p):
        return plain_mmgcn.embeddings(p, mean, features, n_layers, combination)

    final = embeddings(as_float64(model))
    assert_embeddings_match(model, world, final[:7], final[7:])
    assert_two_steps_match(
        model, world, lambda p, _, batch: plain_mmgcn.loss(p, embeddings(p), batch, 7, l2=0.3)
    )


def test_ids_and_preferences_are_parameters_and_move() -> None:
    world = tiny_world("image", "text")
    model = Mmgcn(world.split.train, world.features, MmgcnConfig(dim=3), np.random.default_rng(0))
    names = [name for name, _ in model.named_parameters()]
    assert {"ids", "networks.image.preferences", "networks.text.preferences"} <= set(names)
    assert set(model.state_dict()) == set(names)
