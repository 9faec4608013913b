from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from recommenders.feature_input import FeatureTable
from recommenders.live import LiveTable
from recommenders.models.registry import build_model
from recommenders.pooled import PooledPairs
from recommenders.sampling import Batch
from tests.recommenders.linear_encoder import LinearEncoder
from tests.worlds import random_world

N_USERS, N_ITEMS = 8, 12
LISTENING = {"vbpr": {}, "freedom": {"k": 3, "feature_weight": 0.5}, "lattice": {"k": 3}}
BATCH = Batch(torch.tensor([0, 3, 3]), torch.tensor([2, 5, 2]), torch.tensor([[7], [1], [9]]))


def unit(_: str, vectors: torch.Tensor) -> torch.Tensor:
    return normalize(vectors, dim=1)


def contents() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(N_ITEMS, 5, generator=generator) for name in ("image", "text")}


def table_of(encoder: LinearEncoder, *, grad: bool = False, absent: tuple[int, ...] = ()) -> FeatureTable:
    """The whole catalogue encoded at once, zeros where a picture is absent."""
    rows = torch.arange(N_ITEMS)
    with torch.set_grad_enabled(grad):
        vectors = {name: unit(name, encoder.vectors(name, rows)) for name in encoder.modalities}
        present = {name: torch.ones(N_ITEMS, dtype=torch.bool) for name in vectors}
        for row in absent:
            present["image"][row] = False
        vectors["image"] = vectors["image"] * present["image"][:, None]
    return FeatureTable(vectors, present)


def items_of(batch: Batch) -> torch.Tensor:
    return torch.cat([batch.positives, batch.negatives.flatten()]).unique()


@pytest.mark.parametrize("name", list(LISTENING))
def test_gradients_are_those_of_autograd_through_the_whole_catalogue(name: str) -> None:
    train = random_world(n_users=N_USERS, n_items=N_ITEMS).split.train
    encoder = LinearEncoder(contents())
    model = build_model(name, LISTENING[name], train, table_of(encoder), np.random.default_rng(0)).train()
    parameters = dict(model.named_parameters()) | encoder.named_parameters()
    # LATTICE's graph reads every item's features, so there the batch is all items; else it is a few of them.
    batch = BATCH
    if name == "lattice":
        others = torch.arange(N_ITEMS).roll(3)[:, None]
        batch = Batch(torch.arange(N_ITEMS) % N_USERS, torch.arange(N_ITEMS), others)

    model.start_epoch(table_of(encoder))
    whole = table_of(encoder, grad=True, absent=(5,))
    model.loss(batch, whole).backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in parameters.items() if parameter.grad is not None
    }
    assert {f"maps.{modality}" for modality in encoder.modalities} <= set(expected)
    for parameter in parameters.values():
        parameter.grad = None

    live = LiveTable(table_of(encoder, absent=(5,)), encoder, unit)
    loss = live.step(items_of(batch), lambda table, _: model.loss(batch, table))
    torch.testing.assert_close(loss, model.loss(batch, whole).detach())
    for key, gradient in expected.items():
        torch.testing.assert_close(parameters[key].grad, gradient, rtol=1e-5, atol=1e-7, msg=key)


def test_each_item_of_a_batch_is_encoded_once_and_absent_ones_never() -> None:
    encoder = LinearEncoder(contents())
    live = LiveTable(table_of(encoder, absent=(5,)), encoder, unit)
    live.step(items_of(BATCH), lambda table, _: table.vectors["image"].sum() + table.vectors["text"].sum())
    assert encoder.encoded == [("image", [1, 2, 7, 9]), ("text", [1, 2, 5, 7, 9])]


def test_rows_keep_their_last_value_until_the_table_is_refreshed() -> None:
    encoder = LinearEncoder(contents())
    before = table_of(encoder, absent=(5,))
    live = LiveTable(before, encoder, unit)
    with torch.no_grad():
        for matrix in encoder.maps.values():
            matrix.mul_(-2)
    live.step(torch.tensor([2, 5]), lambda table, _: table.vectors["text"].square().sum())
    after, table = table_of(encoder, absent=(5,)), live.table()
    torch.testing.assert_close(table.vectors["text"][[2, 5]], after.vectors["text"][[2, 5]])
    torch.testing.assert_close(table.vectors["text"][[0, 1, 3]], before.vectors["text"][[0, 1, 3]])
    assert not table.vectors["image"][5].any()
    live.refresh()
    torch.testing.assert_close(live.table().vectors["text"], after.vectors["text"])
    torch.testing.assert_close(live.table().vectors["image"], after.vectors["image"])


def test_a_modality_that_the_encoder_lacks_stays_as_it_is() -> None:
    encoder = LinearEncoder({"text": contents()["text"]})
    features = table_of(LinearEncoder(contents()))
    live = LiveTable(features, encoder, unit)
    live.step(torch.tensor([1]), lambda table, _: table.vectors["text"].sum())
    live.refresh()
    assert torch.equal(live.table().vectors["image"], features.vectors["image"])
    assert [name for name, _ in encoder.encoded] == ["text"]


def test_pooled_negatives_are_of_the_pool_free_and_evenly_drawn() -> None:
    train = random_world(n_users=N_USERS, n_items=N_ITEMS, density=0.3).split.train
    taken = set(zip(train.user_rows.tolist(), train.item_rows.tolist(), strict=True))
    pairs = PooledPairs(train, pool_size=4)
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((N_USERS, N_ITEMS))
    for _ in range(2000):
        for batch in pairs.epoch(8, 2, generator):
            for user, items in zip(batch.users.tolist(), batch.negatives.tolist(), strict=True):
                for item in items:
                    assert (user, item) not in taken
                    counts[user, item] += 1
    for user in range(N_USERS):
        free = [item for item in range(N_ITEMS) if (user, item) not in taken]
        if counts[user].sum():
            shares = counts[user, free] / counts[user].sum()
            np.testing.assert_allclose(shares, 1 / len(free), rtol=0.2)


def test_a_step_touches_few_items_but_for_users_who_have_the_whole_pool() -> None:
    train = random_world(n_users=N_USERS, n_items=N_ITEMS, density=0.2).split.train
    pairs = PooledPairs(train, pool_size=5)
    for batch in pairs.epoch(1000, 3, torch.Generator().manual_seed(0)):
        assert len(batch.negatives.unique()) <= 5
    tiny = PooledPairs(train, pool_size=1)
    seen = set(zip(train.user_rows.tolist(), train.item_rows.tolist(), strict=True))
    for batch in tiny.epoch(1000, 3, torch.Generator().manual_seed(0)):
        every = zip(batch.users.tolist(), batch.negatives.tolist(), strict=True)
        assert not any((user, item) in seen for user, items in every for item in items)
