"""Negatives are free items, uniformly drawn; epochs hold every pair once; a saved state continues exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from recommenders import sampling
from recommenders.errors import TrainingError
from recommenders.interactions import Interactions
from recommenders.sampling import (
    Batch,
    HardSampler,
    InBatchSampler,
    NegativeSampler,
    PopularitySampler,
    SamplingConfig,
    TrainingPairs,
    negative_sampler,
)
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


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_drawing_for_many_batches_at_once_draws_the_same(
    negatives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = random_world(n_users=30, n_items=20).split.train
    pairs = TrainingPairs(train, config=SamplingConfig(negatives=negatives))
    epochs = []
    for ahead in (1, 1000):
        monkeypatch.setattr(sampling, "_AHEAD", ahead)
        epochs.append(list(pairs.epoch(7, 3, seeded())))
    assert len(epochs[0]) == pairs.n_batches(7) > 2
    for one, other in zip(*epochs, strict=True):
        assert torch.equal(one.users, other.users)
        assert torch.equal(one.positives, other.positives)
        assert torch.equal(one.negatives, other.negatives)


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


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_popular_items_are_drawn_by_their_degree_to_the_power_of_alpha(alpha: float) -> None:
    n_items = 12
    pairs = [(1 + (5 * k + j) % 38, k) for k in range(n_items) for j in range(3 * k + 1)]
    pairs += [(0, 3), (0, 11)]
    n_users = 40
    train = interactions_of(pairs, n_users=n_users, n_items=n_items)
    degrees = np.bincount(train.item_rows, minlength=n_items)
    draws = PopularitySampler(train, alpha).sample(torch.tensor([0, n_users - 1]), 60_000, seeded(2))
    for row, user in enumerate((0, n_users - 1)):  # the last has nothing in training
        free = free_items(train, user)
        counts = np.bincount(draws[row].numpy(), minlength=n_items)
        assert counts[free].sum() == 60_000
        weights = degrees[free] ** alpha
        assert stats.chisquare(counts[free], 60_000 * weights / weights.sum()).pvalue > 1e-4


def test_popular_draws_are_never_training_items_nor_items_nobody_took() -> None:
    train = random_world(n_users=12, n_items=15, density=0.5).split.train
    train = train.take(train.item_rows != 4)
    draws = PopularitySampler(train, 1.0).sample(torch.arange(12), 800, seeded())
    for user in range(12):
        taken = set(train.item_rows.tolist())
        assert sorted(set(draws[user].tolist())) == [i for i in free_items(train, user) if i in taken]


def test_a_user_whose_free_items_nobody_took_still_gets_one() -> None:
    train = interactions_of([(0, 0), (0, 1), (1, 0)], n_users=2, n_items=4)
    draws = PopularitySampler(train, 1.0).sample(torch.zeros(50, dtype=torch.int64), 2, seeded())
    assert set(draws.flatten().tolist()) == {2, 3}


def in_batch_draw(n_negatives: int = 40) -> tuple[Interactions, Batch]:
    train = random_world(n_users=12, n_items=15, density=0.3).split.train
    sampler, rows = InBatchSampler(train), torch.arange(0, len(train), 2)
    users, positives = (torch.from_numpy(part)[rows] for part in (train.user_rows, train.item_rows))
    return train, sampler.batch(users, positives, n_negatives, seeded())


def test_in_batch_negatives_are_all_free_positives_of_other_rows() -> None:
    train, batch = in_batch_draw(n_negatives=600)
    shown = set(batch.positives.tolist())
    for row, user in enumerate(batch.users.tolist()):
        assert set(batch.negatives[row].tolist()) == shown & set(free_items(train, user))


def test_a_batch_knows_whose_positives_are_whose_and_how_often_they_come() -> None:
    train, batch = in_batch_draw()
    assert batch.in_batch is not None
    pairs = set(zip(train.user_rows.tolist(), train.item_rows.tolist(), strict=True))
    expected = [[(u, i) in pairs for i in batch.positives.tolist()] for u in batch.users.tolist()]
    assert batch.in_batch.taken.tolist() == expected
    assert any(
        taken for row, line in enumerate(expected) for column, taken in enumerate(line) if row != column
    )
    shares = np.bincount(train.item_rows, minlength=15) / len(train)
    np.testing.assert_allclose(batch.in_batch.log_q, np.log(shares[batch.positives.numpy()]), rtol=1e-6)


def test_where_a_batch_holds_no_free_item_one_of_the_catalogue_stands_in() -> None:
    train = interactions_of([(0, 1), (0, 2), (1, 3)], n_users=2, n_items=5)
    batch = InBatchSampler(train).batch(torch.tensor([0, 0]), torch.tensor([1, 2]), 100, seeded())
    assert set(batch.negatives.flatten().tolist()) == {0, 3, 4}


def test_the_hardest_of_the_candidates_is_taken() -> None:
    train = random_world(n_users=12, n_items=15, density=0.3).split.train
    values = torch.randn(12, 15, generator=seeded(5))
    users = torch.arange(12)
    candidates = NegativeSampler(train).sample(users, 2 * 3, seeded(1))
    hardest = HardSampler(train, 3, lambda u, i: values[u[:, None], i]).sample(users, 2, seeded(1))
    for user in range(12):
        for n in range(2):
            own = candidates[user, 3 * n : 3 * n + 3].tolist()
            assert hardest[user, n] == max(own, key=lambda item: float(values[user, item]))


@pytest.mark.parametrize(
    ("negatives", "kind"),
    [
        ("uniform", NegativeSampler),
        ("popularity", PopularitySampler),
        ("in-batch", InBatchSampler),
        ("hard", HardSampler),
    ],
)
def test_settings_name_the_sampler_and_every_epoch_draws_free_items(negatives: str, kind: type) -> None:
    train = random_world().split.train
    config = SamplingConfig.model_validate({"negatives": negatives})

    def scores(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return items.float()

    pairs = TrainingPairs(train, config=config, scores=scores)
    assert type(pairs.sampler) is kind
    for batch in epoch(pairs, seeded()):
        assert batch.negatives.shape == (len(batch.users), 3)
        keys = batch.users[:, None] * train.n_items + batch.negatives
        assert not np.isin(keys.numpy(), train.keys()).any()
        assert (batch.in_batch is not None) == (negatives == "in-batch")


def test_hard_negatives_without_scores_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"'hard', which needs the scores of pairs.*such as bpr"):
        negative_sampler(random_world().split.train, SamplingConfig(negatives="hard"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in-batch", "hard"])
def test_negatives_on_a_gpu_are_free_items_too(negatives: str) -> None:
    train = random_world(n_users=12, n_items=15, density=0.3).split.train
    config = SamplingConfig.model_validate(
        {"negatives": negatives, "popularity_alpha": 0, "hard_candidates": 2}
    )
    sampler = negative_sampler(train, config, "cuda", lambda users, items: -items.float())
    users = torch.arange(12, device="cuda")
    positives = torch.arange(15, device="cuda")[:12]
    draws = sampler.batch(users, positives, 2_000, seeded(0, "cuda")).negatives
    assert draws.is_cuda
    if negatives == "in-batch":
        keys = (users[:, None] * train.n_items + draws).cpu().numpy()
        assert not np.isin(keys, train.keys()).any()
        return
    for user in range(train.n_users):
        assert sorted(set(draws[user].tolist())) == free_items(train, user)
