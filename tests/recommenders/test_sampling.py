"""Negatives are free items, uniformly drawn; epochs hold every pair once; a saved state continues exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from recommenders.errors import TrainingError
from recommenders.interactions import Interactions
from recommenders.sampling import Batch, NegativeSampler, TrainingPairs
from tests.worlds import interactions_of, random_world


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def free_items(train: Interactions, user: int) -> list[int]:
    taken = set(train.item_rows[train.user_rows == user].tolist())
    return [item for item in range(train.n_items) if item not in taken]


def test_each_user_draws_all_free_items_and_no_training_item() -> None:
    train = random_world(n_users=12, n_items=15, density=0.5).split.train
    users = torch.arange(train.n_users)
    draws = NegativeSampler(train).sample(users, 800, seeded())
    assert draws.shape == (12, 800)
    assert draws.dtype == torch.int64
    for user in range(train.n_users):
        assert sorted(set(draws[user].tolist())) == free_items(train, user)


def test_draws_are_uniform_for_users_with_no_few_and_nearly_all_items() -> None:
    n_items = 40
    pairs = [(1, 0), (1, 39), (1, 7)] + [(2, item) for item in range(n_items) if item not in (5, 6, 38)]
    train = interactions_of(pairs, n_users=4, n_items=n_items)
    draws = NegativeSampler(train).sample(torch.arange(4), 60_000, seeded(3))
    for user in range(4):
        free = free_items(train, user)
        counts = np.bincount(draws[user].numpy(), minlength=n_items)[free]
        assert counts.sum() == 60_000
        # At 4 users a right sampler fails once in 2,500 seeds; never drawing one of 40 gives p < 1e-200.
        assert stats.chisquare(counts).pvalue > 1e-4, user


def test_draws_of_one_user_are_independent_between_columns() -> None:
    train = interactions_of([(0, 2)], n_users=1, n_items=5)
    draws = NegativeSampler(train).sample(torch.zeros(20_000, dtype=torch.int64), 2, seeded(1)).numpy()
    table = np.zeros((5, 5))
    np.add.at(table, (draws[:, 0], draws[:, 1]), 1)
    free = [0, 1, 3, 4]
    assert stats.chi2_contingency(table[np.ix_(free, free)]).pvalue > 1e-4


def test_a_user_with_one_free_item_gets_it_every_time() -> None:
    train = interactions_of([(0, item) for item in range(9) if item != 4], n_users=2, n_items=9)
    assert set(NegativeSampler(train).sample(torch.tensor([0, 0]), 50, seeded()).flatten().tolist()) == {4}


def test_repeated_training_pairs_change_nothing() -> None:
    once = interactions_of([(0, 1), (1, 3), (0, 2)], n_users=2, n_items=5)
    twice = interactions_of([(0, 1), (1, 3), (0, 1), (0, 2), (0, 2)], n_users=2, n_items=5)
    users = torch.tensor([0, 1, 1, 0])
    draws = [NegativeSampler(train).sample(users, 30, seeded()) for train in (once, twice)]
    assert torch.equal(*draws)


def test_a_user_with_all_items_is_refused_by_row() -> None:
    train = interactions_of([(1, 0), (1, 1), (0, 0)], n_users=2, n_items=2)
    with pytest.raises(TrainingError, match=r"User row 1 has all 2 items .*Drop such users"):
        NegativeSampler(train)


def test_training_without_pairs_is_refused() -> None:
    with pytest.raises(TrainingError, match="no training pair"):
        TrainingPairs(interactions_of([], n_users=2, n_items=2))


def epoch(pairs: TrainingPairs, generator: torch.Generator) -> list[Batch]:
    return list(pairs.epoch(batch_size=32, n_negatives=3, generator=generator))


def test_an_epoch_holds_every_pair_once_in_a_new_order_with_free_items() -> None:
    train = random_world().split.train
    pairs, generator = TrainingPairs(train), seeded()
    orders = []
    for _ in range(2):
        batches = epoch(pairs, generator)
        assert len(batches) == pairs.n_batches(32)
        assert [len(batch.users) for batch in batches[:-1]] == [32] * (len(batches) - 1)
        users, positives, negatives = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("users", "positives", "negatives")
        )
        keys = (users * train.n_items + positives).numpy()
        assert np.sort(keys).tolist() == train.keys().tolist()
        assert negatives.shape == (len(train), 3)
        assert not np.isin((users[:, None] * train.n_items + negatives).numpy(), train.keys()).any()
        orders.append(keys.tolist())
    assert orders[0] != orders[1]


def test_the_state_saved_after_an_epoch_gives_the_next_one_again() -> None:
    pairs, generator = TrainingPairs(random_world().split.train), seeded()
    epoch(pairs, generator)
    state = generator.get_state()
    expected = epoch(pairs, generator)
    other = torch.Generator()
    other.set_state(state)
    for batch, again in zip(expected, epoch(TrainingPairs(random_world().split.train), other), strict=True):
        assert torch.equal(batch.users, again.users)
        assert torch.equal(batch.positives, again.positives)
        assert torch.equal(batch.negatives, again.negatives)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_negatives_on_a_gpu_are_free_items_too() -> None:
    train = random_world(n_users=12, n_items=15, density=0.5).split.train
    draws = NegativeSampler(train, "cuda").sample(torch.arange(12, device="cuda"), 800, seeded(0, "cuda"))
    assert draws.is_cuda
    for user in range(train.n_users):
        assert sorted(set(draws[user].tolist())) == free_items(train, user)
