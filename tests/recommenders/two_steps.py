"""Two SGD steps of a model beside those of a plain loss."""

from __future__ import annotations

import numpy as np
import torch

from recommenders.feature_input import FeatureTable
from recommenders.models.base import Recommender
from recommenders.sampling import Batch
from tests.recommenders.steps import as_float64
from tests.references.numeric import PlainLoss, descend
from tests.worlds import World, random_world


def tiny_world(*modalities: str) -> World:
    """Seven users, nine items; the first item has no features of the first modality, zeros in their place."""
    world = random_world(n_users=7, n_items=9, density=0.6, dim=3)
    rng = np.random.default_rng(5)
    vectors, present = {}, {}
    for place, name in enumerate(modalities):
        vectors[name] = torch.from_numpy(rng.standard_normal((9, 3 + place), dtype=np.float32))
        present[name] = torch.ones(9, dtype=torch.bool)
    if modalities:
        present[modalities[0]][0] = False
        vectors[modalities[0]][0] = 0
    return World(world.interactions, world.split, FeatureTable(vectors, present))


def tables_of(world: World) -> dict[str, np.ndarray]:
    """Return the features in float64, by modality."""
    return {name: table.double().numpy() for name, table in world.features.vectors.items()}


def masks_of(world: World) -> dict[str, np.ndarray]:
    """Return which items have each modality."""
    return {name: mask.numpy() for name, mask in world.features.present.items()}


def assert_two_steps_match(
    model: Recommender,
    world: World,
    plain_loss: PlainLoss,
    *,
    learning_rate: float = 0.3,
    eval_mode: bool = False,
) -> None:
    """Compare losses and parameters; in eval mode nothing of the loss is drawn at random."""
    model.train(not eval_mode)
    train = world.split.train
    rng = np.random.default_rng(9)
    middle = len(train) // 2 + 1
    batches = []
    for rows in (slice(0, middle), slice(middle, None)):
        users, items = train.user_rows[rows], train.item_rows[rows]
        batches.append((users, items, rng.integers(train.n_items, size=(len(users), 2))))
    parameters = as_float64(model)
    expected = descend(parameters, plain_loss, batches, learning_rate=learning_rate)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model.loss(Batch(*(torch.from_numpy(rows) for rows in batch)), world.features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name, value in as_float64(model).items():
        np.testing.assert_allclose(value, parameters[name], rtol=1e-4, atol=2e-6, err_msg=name)


def assert_embeddings_match(model: Recommender, world: World, users: np.ndarray, items: np.ndarray) -> None:
    """Compare what scores are made of, as it is when nothing is drawn at random."""
    model.eval()
    with torch.no_grad():
        own_users, own_items = (part.detach() for part in model(world.features))
    np.testing.assert_allclose(own_users @ own_items.T, users @ items.T, rtol=1e-4, atol=1e-5)
