from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split
from recommenders.models.vbpr import Vbpr, VbprConfig
from recommenders.sampling import Batch
from recommenders.training import TrainingConfig, train
from tests.recommenders.steps import as_float64, train_two_steps
from tests.references.plain_vbpr import PlainVbpr, train_vbpr
from tests.worlds import World, interactions_of, random_world


def plain(model: Vbpr) -> PlainVbpr:
    """The model's parameters under the paper's names, the modalities concatenated as in its table."""
    values = as_float64(model)
    projections = np.concatenate([values[f"projections.{name}"] for name in model.projections])
    dim = values["item_factors"].shape[1]
    return PlainVbpr(
        values["item_bias"],
        values["users"][:, :dim],
        values["item_factors"],
        values["users"][:, dim:],
        projections[:, :-1].T,
        projections[:, -1],
    )


def concatenated(features: FeatureTable) -> np.ndarray:
    return torch.cat(list(features.vectors.values()), dim=1).double().numpy()


def with_biases(model: Vbpr) -> Vbpr:
    """Biases start at 0; numbers there make a test see them."""
    with torch.no_grad():
        model.item_bias.copy_(torch.linspace(-1, 1, model.n_items))
        for projection in model.projections.values():
            projection[:, -1] = torch.linspace(-1, 1, len(projection))
    return model


def test_two_training_steps_match_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    world = random_world(n_users=7, n_items=9)
    config = VbprConfig(dim=3, content_dim=2, l2=0.3, l2_projection=0.2)
    model = with_biases(Vbpr(world.split.train, world.features, config, np.random.default_rng(0)))
    expected = plain(model)
    batches, losses = train_two_steps(model, world, monkeypatch, learning_rate=0.7)
    plain_losses = train_vbpr(
        expected, concatenated(world.features), batches, learning_rate=0.7, l2=0.3, l2_projection=0.2
    )
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-4)
    after = plain(model)
    for name in vars(expected):
        np.testing.assert_allclose(getattr(after, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def test_the_inner_product_is_eq_1() -> None:
    world = random_world(n_users=7, n_items=9)
    config = VbprConfig(dim=3, content_dim=2)
    model = with_biases(Vbpr(world.split.train, world.features, config, np.random.default_rng(0)))
    users, items = model(world.features)
    assert users.shape == (7, 3 + 2 + 1)
    book, vectors = plain(model), concatenated(world.features)
    expected = [[book.score(user, item, vectors) for item in range(9)] for user in range(7)]
    np.testing.assert_allclose((users @ items.T).detach(), expected, rtol=1e-5, atol=1e-6)


def test_only_the_items_of_a_batch_are_projected() -> None:
    world = random_world(n_users=7, n_items=9)
    model = Vbpr(world.split.train, world.features, VbprConfig(dim=3), np.random.default_rng(0))
    table = world.features.vectors["image"].clone().requires_grad_()
    features = FeatureTable(world.features.vectors | {"image": table}, world.features.present)
    batch = Batch(torch.tensor([1, 2]), torch.tensor([3, 3]), torch.tensor([[5], [8]]))
    model.loss(batch, features).backward()
    assert table.grad is not None
    assert table.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [3, 5, 8]


@pytest.mark.parametrize("n_negatives", [1, 3])
@pytest.mark.parametrize("n_items", [5, 40])  # fewer than the batch's pairs, and more
def test_differences_of_features_rank_as_scores_do(n_items: int, n_negatives: int) -> None:
    world = random_world(n_users=7, n_items=n_items)
    model = with_biases(
        Vbpr(
            world.split.train,
            world.features,
            VbprConfig(dim=3, l2=0, l2_projection=0),
            np.random.default_rng(0),
        )
    ).double()
    features = FeatureTable(
        {name: table.double() for name, table in world.features.vectors.items()}, world.features.present
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(n_items, (9, 1 + n_negatives), generator=generator)
    batch = Batch(torch.randint(7, (9,), generator=generator), rows[:, 0], rows[:, 1:])
    loss = model.loss(batch, features)
    users, items = model(features)
    scores = (users @ items.T)[batch.users.unsqueeze(1), rows]
    expected = torch.log1p(torch.exp(scores[:, 1:] - scores[:, :1])).mean()
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for found, right in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, right)


def chosen_by_content(seed: int = 0, n_users: int = 150, n_items: int = 200) -> World:
    """Users take the items whose hidden trait fits their taste best; features show the trait, noisily."""
    rng = np.random.default_rng(seed)
    traits = rng.standard_normal((n_items, 5))
    tastes = rng.standard_normal((n_users, 5))
    utility = tastes @ traits.T + 0.5 * rng.gumbel(size=(n_users, n_items))
    taken = np.argsort(-utility, axis=1)[:, :6]
    parts = []
    for columns in (slice(0, 6, 3), slice(1, 6, 3), slice(2, 6, 3)):
        pairs = [(user, int(item)) for user in range(n_users) for item in taken[user, columns]]
        parts.append(interactions_of(pairs, n_users, n_items))
    whole = Interactions(np.repeat(np.arange(n_users), 6), taken.reshape(-1), n_users, n_items)
    seen = traits @ rng.standard_normal((5, 16)) + 0.2 * rng.standard_normal((n_items, 16))
    vectors = {"image": normalize(torch.from_numpy(seen.astype(np.float32)), dim=1)}
    table = FeatureTable(vectors, {"image": torch.ones(n_items, dtype=torch.bool)})
    return World(whole, Split(*parts, rule="chosen by content"), table)


def test_features_that_cause_the_choices_beat_random_features() -> None:
    world = chosen_by_content()
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal((200, 16), dtype=np.float32))
    random_table = FeatureTable({"image": normalize(noise, dim=1)}, world.features.present)
    config = TrainingConfig(epochs=40, batch_size=64, learning_rate=0.02, patience=0)
    evaluation = EvaluationConfig(ks=(20,))
    recall = {}
    for name, table in (("true", world.features), ("random", random_table)):
        model = Vbpr(world.split.train, table, VbprConfig(dim=8, content_dim=8), np.random.default_rng(0))
        rng = np.random.default_rng(1)
        train(model, world.split.train, world.split.valid, table, config, evaluation=evaluation, rng=rng)
        measured = evaluate(model.scorer(table), world.split.test, world.split.train, evaluation)
        recall[name] = measured.metrics["recall@20"]
    chance = 20 / (200 - 2)
    assert recall["true"] > 2 * recall["random"], recall
    assert recall["true"] > 3 * chance, recall
