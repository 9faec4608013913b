from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.models.mmgcl import Draws, Mmgcl, MmgclConfig
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import assert_embeddings_match, assert_two_steps_match, tiny_world
from tests.references import plain_mmgcl
from tests.references.plain_graphs import bipartite, user_item_matrix
from tests.references.plain_modality_encoder import embeddings
from tests.worlds import World

CONFIG = MmgclConfig(dim=3, n_layers=2, edge_dropout=0.4, ssl_weight=0.5, ssl_temperature=0.7, l2=0.3)


def mmgcl(world: World, **changes: object) -> Mmgcl:
    config = CONFIG.model_copy(update=changes)
    return Mmgcl(world.split.train, world.features, config, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("modalities", "masked", "swapped", "contrast"),
    [
        (("text",), 1, 1, "views"),
        (("image", "text"), 1, 2, "views"),
        (("image", "text"), 2, 1, "pairs"),
        (("image", "text", "fused"), 3, 3, "views"),
    ],
)
def test_two_training_steps_match_the_plain_loss(
    modalities: tuple[str, ...],
    masked: int,
    swapped: int,
    contrast: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = tiny_world(*modalities)
    model = mmgcl(world, contrast=contrast)
    features = {name: table.double().numpy() for name, table in world.features.vectors.items()}
    adjacency = bipartite(user_item_matrix(world.split.train))
    assert_embeddings_match(model, world, *embeddings(as_float64(model), adjacency, features, 2))

    torch.manual_seed(0)
    model.start_epoch(world.features)
    torch.manual_seed(0)
    kept = model.graph.sample(int(0.6 * len(model.graph))).numpy()
    assert 0 < kept.sum() < len(kept)
    thinned = np.zeros((7, 9))
    thinned[model.graph.users[kept], model.graph.items[kept]] = 1
    noise = torch.randn(9, 3)
    monkeypatch.setattr(model, "draw", lambda: Draws(masked, noise, swapped))

    def plain(p, _, batch):
        draws = (masked, noise.double().numpy(), swapped)
        options = {"n_layers": 2, "contrast": contrast, "ssl_weight": 0.5, "temperature": 0.7, "l2": 0.3}
        return plain_mmgcl.loss(p, adjacency, bipartite(thinned), features, batch, draws, **options)

    assert_two_steps_match(model, world, plain, learning_rate=0.1)


def test_every_modality_is_masked_and_swapped_at_times_and_the_ids_never() -> None:
    world = tiny_world("image", "text", "fused")
    model = mmgcl(world)
    torch.manual_seed(0)
    drawn = [model.draw() for _ in range(100)]
    assert {draws.masked for draws in drawn} == {draws.swapped for draws in drawn} == {1, 2, 3}
    assert drawn[0].noise.shape == model.encoder.items.shape
    assert not torch.equal(drawn[0].noise, drawn[1].noise)
