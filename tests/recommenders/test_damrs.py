from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models import graded_relations
from recommenders.models.damrs import DaMrs, DaMrsConfig, behaviour_graph, consistent_edges
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.recommenders.two_steps import (
    assert_embeddings_match,
    assert_two_steps_match,
    masks_of,
    tables_of,
    tiny_world,
)
from tests.references import plain_damrs
from tests.references.plain_damrs import PlainDaMrs
from tests.references.plain_graphs import user_item_matrix
from tests.worlds import World, interactions_of

SHARED = {
    "n_layers": 2,
    "n_item_layers": 1,
    "k": 3,
    "behaviour_k": 2,
    "min_common": 2,
    "preference_weight": 0.5,
    "relation_weight": 0.3,
    "n_positives": 2,
    "temperature": 0.4,
    "l2": 0.2,
}
BATCH = Batch(torch.tensor([0, 2, 2]), torch.tensor([1, 4, 1]), torch.tensor([[3, 4], [5, 0], [0, 0]]))


def model_of(world: World, **settings: object) -> DaMrs:
    config = DaMrsConfig.model_validate({"dim": 3, **SHARED, **settings})
    return DaMrs(world.split.train, world.features, config, np.random.default_rng(0))


def dense(edges) -> np.ndarray:
    matrix = np.zeros((edges.n_nodes, edges.n_nodes))
    np.add.at(matrix, (edges.sources.numpy(), edges.targets.numpy()), 1)
    return matrix


@pytest.mark.parametrize(
    ("modalities", "n_item_layers"), [(("text",), 1), (("image", "text"), 2), (("image", "text", "sound"), 1)]
)
def test_two_training_steps_match_the_plain_loss(modalities: tuple[str, ...], n_item_layers: int) -> None:
    world = tiny_world(*modalities)
    model = model_of(world, n_item_layers=n_item_layers)
    with torch.no_grad():
        model.embeddings.mul_(2)  # away from 0, where all chances are alike
    matrix = user_item_matrix(world.split.train)
    settings = SHARED | {"n_item_layers": n_item_layers}
    plain = PlainDaMrs(matrix, tables_of(world), masks_of(world), **settings)
    assert_embeddings_match(model, world, *plain.final(as_float64(model)))
    train = world.split.train
    batch = (train.user_rows, train.item_rows, np.full((len(train), 1), 3))
    weights = np.array(plain.trust(as_float64(model), batch))
    assert (weights > 0).any(axis=0).all()  # some pairs are doubted
    assert_two_steps_match(model, world, plain.loss)


@pytest.mark.parametrize("modalities", [("text",), ("image", "text"), ("image", "text", "sound")])
@pytest.mark.parametrize("block_rows", [0, 2])
def test_edges_are_those_all_modalities_agree_on(modalities: tuple[str, ...], block_rows: int) -> None:
    features = tiny_world(*modalities).features
    found = consistent_edges(features, 3, block_rows)
    tables = {name: table.double().numpy() for name, table in features.vectors.items()}
    masks = {name: mask.numpy() for name, mask in features.present.items()}
    expected = plain_damrs.content_graphs(tables, masks, 3)
    for edges, graph in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(dense(edges), graph > 0)
        assert all(first <= second for first, second in pairwise(edges.sources.tolist()))
    lacking = found[modalities[0]]
    assert lacking.targets[lacking.sources == 0].tolist() == [0]  # an item without the modality


def test_a_modality_that_disagrees_takes_an_edge_from_all() -> None:
    text = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1], [-1.0, 0.1]])
    here = torch.ones(4, dtype=torch.bool)
    alone = consistent_edges(FeatureTable({"text": text}, {"text": here}), k=2)["text"]
    assert dense(alone)[0].tolist() == [1, 1, 0, 0]
    both = consistent_edges(FeatureTable({"text": text, "image": image}, {"text": here, "image": here}), k=2)
    for edges in both.values():
        np.testing.assert_array_equal(dense(edges), np.eye(4))
    unseen = FeatureTable(
        {"text": text, "image": image}, {"text": here, "image": here & (torch.arange(4) > 0)}
    )
    assert dense(consistent_edges(unseen, k=2)["text"])[0].tolist() == [1, 1, 0, 0]


def test_behaviour_needs_several_common_users() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2), (3, 3)]
    train = interactions_of(pairs, n_users=4, n_items=4)
    together = dense(behaviour_graph(train, k=2, min_common=2).edges)
    np.testing.assert_array_equal(together, np.eye(4) + np.eye(4)[[1, 0, 2, 3]] * [[1], [1], [0], [0]])
    once = dense(behaviour_graph(train, k=2, min_common=1).edges)
    assert once[2].tolist() == [0, 1, 1, 0]


def test_blocks_of_items_change_no_loss_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny_world("image", "text")
    gradients = []
    for numbers in (1 << 22, 2 * 9):
        monkeypatch.setattr(graded_relations, "BLOCK_NUMBERS", numbers)
        model = model_of(world)
        model.loss(BATCH, world.features).backward()
        gradients.append(model.embeddings.grad)
    torch.testing.assert_close(*gradients)


def test_live_rows_get_the_gradient_of_weights_by_cosine_and_change_no_value() -> None:
    world = tiny_world("image", "text")
    model = model_of(world)
    live = {name: table.clone().requires_grad_() for name, table in world.features.vectors.items()}
    loss = model.loss(BATCH, FeatureTable(live, world.features.present))
    torch.testing.assert_close(loss.detach(), model.loss(BATCH, world.features).detach())
    loss.backward()
    for name, table in live.items():
        assert table.grad is not None
        assert table.grad.isfinite().all()
        assert table.grad.abs().max() > 0, name


def test_without_denoising_the_ranking_loss_is_bpr() -> None:
    world = tiny_world("image", "text")
    model = model_of(world, denoise=False, preference_weight=0, relation_weight=0, l2=0)
    users, items = model(world.features)
    scores = (
        users[BATCH.users].unsqueeze(1) * items[torch.cat([BATCH.positives[:, None], BATCH.negatives], 1)]
    ).sum(-1)
    expected = torch.nn.functional.softplus(scores[:, 1:] - scores[:, :1]).mean()
    torch.testing.assert_close(model.loss(BATCH, world.features), expected)
