from __future__ import annotations

import numpy as np
import pytest
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.item_knn import ItemKnn, ItemKnnConfig, ItemKnnContent, ItemKnnContentConfig
from tests.references.plain_item_knn import cosine, item_knn_scores
from tests.worlds import World, interactions_of, random_world


def model_of(world: World, k: int) -> ItemKnnContent:
    return ItemKnnContent(
        world.split.train, world.features, ItemKnnContentConfig(k=k), np.random.default_rng(0)
    )


def histories(world: World) -> list[list[int]]:
    train = world.split.train
    return [sorted(set(train.item_rows[train.user_rows == user])) for user in range(world.n_users)]


@pytest.mark.parametrize("k", [1, 4, 100])
def test_scores_match_the_plain_loop(k: int) -> None:
    world = random_world(n_users=9, n_items=14)
    image = FeatureTable(
        {"image": world.features.vectors["image"]}, {"image": world.features.present["image"]}
    )
    scores = model_of(world, k).scorer(image)(torch.arange(9))
    expected = item_knn_scores(histories(world), image.vectors["image"].double().numpy(), k)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_the_cosine_of_two_modalities_is_the_mean_of_theirs() -> None:
    world = random_world(n_users=9, n_items=14)
    image, text = (world.features.vectors[name].double().numpy() for name in ("image", "text"))
    everyone = model_of(world, 13).scorer(world.features)(torch.arange(9))
    expected = np.zeros((9, 14))
    for user, history in enumerate(histories(world)):
        for i in history:
            for j in range(14):
                if i != j:
                    expected[user, j] += (cosine(image[i], image[j]) + cosine(text[i], text[j])) / 2
    np.testing.assert_allclose(everyone, expected, rtol=1e-4, atol=1e-6)


def test_the_lists_follow_the_features_handed_to_the_scorer() -> None:
    world = random_world(n_users=9, n_items=14)
    model = model_of(world, 2)
    others = random_world(n_users=9, n_items=14, seed=1).features
    fresh = ItemKnnContent(world.split.train, others, ItemKnnContentConfig(k=2), np.random.default_rng(0))
    model.scorer(world.features)
    torch.testing.assert_close(model.scorer(others)(torch.arange(9)), fresh.scorer(others)(torch.arange(9)))


def test_an_item_without_features_neither_gives_nor_gets_a_score() -> None:
    world = random_world(n_users=9, n_items=14)
    vectors = world.features.vectors["text"].clone()
    vectors[5] = 0
    present = torch.ones(14, dtype=torch.bool)
    present[5] = False
    table = FeatureTable({"text": vectors}, {"text": present})
    train = interactions_of([(0, 5), (1, 3)], n_users=2, n_items=14)
    model = ItemKnnContent(train, table, ItemKnnContentConfig(k=13), np.random.default_rng(0))
    scores = model.scorer(table)(torch.arange(2))
    assert scores[0].abs().max() == 0
    assert scores[1, 5] == 0
    assert scores[1].abs().max() > 0


def test_users_in_any_order_repeated_and_without_history_get_their_own_scores() -> None:
    world = random_world(n_users=9, n_items=14)
    train = world.split.train.take(world.split.train.user_rows != 4)
    model = ItemKnnContent(train, world.features, ItemKnnContentConfig(), np.random.default_rng(0))
    scorer = model.scorer(world.features)
    everyone = scorer(torch.arange(9))
    assert everyone[4].abs().max() == 0
    rows = torch.tensor([8, 4, 2, 2, 0])
    assert torch.equal(scorer(rows), everyone[rows])


def knn_on_interactions(world: World, **settings: float) -> ItemKnn:
    config = ItemKnnConfig.model_validate(settings)
    return ItemKnn(world.split.train, FeatureTable(), config, np.random.default_rng(0))


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("shrinkage", [0.0, 2.5])
def test_scores_on_interactions_match_the_plain_loop(k: int, shrinkage: float) -> None:
    world = random_world(n_users=12, n_items=14)
    takers = [set(np.flatnonzero(column)) for column in world.split.train.csr().toarray().T]
    expected = np.zeros((12, 14))
    for user, history in enumerate(histories(world)):
        for i in history:
            others = []
            for j in range(14):
                lengths = np.sqrt(len(takers[i]) * len(takers[j]))
                common = len(takers[i] & takers[j])
                others.append((common / (lengths + shrinkage) if common and j != i else 0.0, j))
            for similarity, j in sorted(others, key=lambda pair: (-pair[0], pair[1]))[:k]:
                expected[user, j] += similarity
    scores = knn_on_interactions(world, k=k, shrinkage=shrinkage).scorer(FeatureTable())(torch.arange(12))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
