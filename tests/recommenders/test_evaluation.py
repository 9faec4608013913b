"""Full ranking against plain loops, its masks, its ties, its blocks and what it refuses."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from recommenders.errors import TrainingError
from recommenders.evaluation import (
    EvaluationConfig,
    Scorer,
    evaluate,
    evaluate_part,
    recommend_top_k,
    seen_before,
    top_k,
)
from recommenders.interactions import Interactions
from tests.references.metrics import plain_evaluation, plain_ranking
from tests.worlds import World, interactions_of, random_world, two_clubs


def scorer_of(scores: np.ndarray) -> Scorer:
    """Look the scores up in a (U, I) table."""
    table = torch.from_numpy(scores)
    return lambda users: table[users]


def tied_scores(world: World, seed: int = 0) -> np.ndarray:
    """(U, I) scores of few different values, so that lists are full of ties."""
    return np.random.default_rng(seed).integers(0, 4, (world.n_users, world.n_items)).astype(np.float32)


def items_of(pairs: Interactions) -> dict[int, set[int]]:
    """User to items, in the order of user rows."""
    found: dict[int, set[int]] = {}
    for user, item in sorted(zip(pairs.user_rows.tolist(), pairs.item_rows.tolist(), strict=True)):
        found.setdefault(user, set()).add(item)
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_evaluation_equals_plain_loops_over_users_and_items(ties: bool) -> None:
    world = random_world(n_users=40, n_items=60)
    scores = np.random.default_rng(1).standard_normal((40, 60), dtype=np.float32)
    if ties:
        scores = tied_scores(world)
    config = EvaluationConfig(ks=(1, 5, 20), block_users=7)
    result = evaluate(scorer_of(scores), world.split.test, world.split.train, config)
    means, per_user = plain_evaluation(
        scores, items_of(world.split.test), items_of(world.split.train), config.ks
    )
    assert set(result.metrics) == set(means)
    for name, value in means.items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-12), name
    assert result.per_user["user_row"].to_list() == list(per_user)
    for row in result.per_user.iter_rows(named=True):
        for name, value in per_user[row["user_row"]].items():
            assert row[name] == pytest.approx(value, abs=1e-12), name


def test_users_without_held_out_items_are_skipped_and_counted() -> None:
    held_out = interactions_of([(3, 1), (1, 2), (3, 1)], n_users=5, n_items=4)
    result = evaluate(
        scorer_of(np.zeros((5, 4), np.float32)),
        held_out,
        interactions_of([], 5, 4),
        EvaluationConfig(ks=(1, 3)),
    )
    assert result.per_user["user_row"].to_list() == [1, 3]
    assert (result.n_users, result.n_skipped) == (2, 3)
    assert result.per_user.schema["recall@3"] == pl.Float64
    # All scores are equal, so everybody gets items 0, 1, 2: ranks 3 and 2 for the items that are held out.
    assert result.per_user["mrr@3"].to_list() == [1 / 3, 1 / 2]
    assert result.metrics["coverage@1"] == 1 / 4
    assert result.metrics["coverage@3"] == 3 / 4


def test_training_items_never_appear_and_validation_items_only_by_default() -> None:
    world = two_clubs(n_users=6, n_items=10)
    scores = np.full((6, 10), -1.0, np.float32)
    scores[world.interactions.user_rows, world.interactions.item_rows] = 1.0
    valid_first = scores.copy()
    valid_first[world.split.valid.user_rows, world.split.valid.item_rows] = 2.0
    scorer = scorer_of(valid_first)
    habit = EvaluationConfig(ks=(1, 2))
    strict = EvaluationConfig(ks=(1, 2), mask_valid_in_test=True)
    assert evaluate_part(scorer, world.split, "valid", habit).metrics["recall@1"] == 1
    # MMRec's habit: the validation item takes the first place, the test item the second.
    assert evaluate_part(scorer, world.split, "test", habit).metrics["mrr@2"] == 0.5
    assert evaluate_part(scorer, world.split, "test", strict).metrics["mrr@2"] == 1
    assert len(seen_before(world.split, "valid", strict)) == len(world.split.train)


def test_a_pair_both_held_out_and_excluded_counts_as_missed() -> None:
    pair = interactions_of([(0, 1)], 1, 3)
    result = evaluate(
        scorer_of(np.array([[0.0, 9.0, 1.0]], np.float32)), pair, pair, EvaluationConfig(ks=(3,))
    )
    assert result.metrics["recall@3"] == 0
    assert result.metrics["coverage@3"] == pytest.approx(2 / 3)


def test_results_do_not_depend_on_the_size_of_blocks() -> None:
    world = random_world(n_users=50, n_items=30)
    scorer = scorer_of(tied_scores(world))
    results = [
        evaluate(scorer, world.split.test, world.split.train, EvaluationConfig(ks=(3, 10), block_users=size))
        for size in (1, 13, 1024)
    ]
    for other in results[1:]:
        assert other.metrics == results[0].metrics
        assert other.per_user.equals(results[0].per_user)


def test_blocks_shrink_so_that_a_large_catalogue_stays_within_the_memory_asked_for() -> None:
    n_users, n_items = 12, 20_000
    held_out = interactions_of([(user, user) for user in range(n_users)], n_users, n_items)
    sizes: list[int] = []

    def scorer(users: Tensor) -> Tensor:
        sizes.append(len(users))
        return torch.zeros(len(users), n_items)

    evaluate(scorer, held_out, interactions_of([], n_users, n_items), EvaluationConfig(block_mb=1))
    # 1 MiB at 16 bytes a score holds 3 users of 20,000 items.
    assert sizes == [3, 3, 3, 3]


def test_permuted_items_permute_the_lists() -> None:
    world = random_world(n_users=20, n_items=30)
    scores = np.random.default_rng(2).standard_normal((20, 30), dtype=np.float32)
    new_row = np.random.default_rng(3).permutation(30)
    train = world.split.train
    moved = Interactions(train.user_rows, new_row[train.item_rows], 20, 30)
    users = np.arange(20)
    items, values = recommend_top_k(scorer_of(scores), users, 8, train)
    moved_items, moved_values = recommend_top_k(scorer_of(scores[:, np.argsort(new_row)]), users, 8, moved)
    np.testing.assert_array_equal(moved_items, new_row[items])
    np.testing.assert_array_equal(moved_values, values)


def test_recommendations_are_the_plain_ranking_of_the_users_asked_for() -> None:
    world = random_world(n_users=20, n_items=30)
    scores, seen = tied_scores(world), items_of(world.split.train)
    users = np.array([7, 3, 19, 3])
    items, values = recommend_top_k(
        scorer_of(scores), users, 9, world.split.train, EvaluationConfig(block_users=3)
    )
    for row, user in enumerate(users.tolist()):
        expected = plain_ranking(scores[user], seen[user], 9)
        assert items[row].tolist() == expected
        assert values[row].tolist() == scores[user][expected].tolist()


def test_places_without_an_unseen_item_hold_minus_one_and_minus_infinity() -> None:
    seen = interactions_of([(0, 0), (0, 2), (0, 3)], n_users=1, n_items=4)
    items, values = recommend_top_k(scorer_of(np.ones((1, 4), np.float32)), np.array([0]), 3, seen)
    assert items.tolist() == [[1, -1, -1]]
    assert values.tolist() == [[1.0, -np.inf, -np.inf]]


def test_lists_are_cut_at_a_short_catalogue_and_metrics_still_divide_by_k() -> None:
    nothing = interactions_of([], 1, 3)
    scorer = scorer_of(np.array([[1.0, 3.0, 2.0]], np.float32))
    items, _ = recommend_top_k(scorer, np.array([0]), 10, nothing)
    assert items.tolist() == [[1, 2, 0]]
    result = evaluate(scorer, interactions_of([(0, 2)], 1, 3), nothing, EvaluationConfig(ks=(2, 10)))
    assert result.metrics["precision@10"] == 0.1
    assert result.metrics["recall@10"] == result.metrics["coverage@10"] == 1


def test_nobody_to_recommend_to_gives_empty_lists() -> None:
    items, values = recommend_top_k(
        scorer_of(np.ones((1, 4))), np.array([], np.int64), 3, interactions_of([], 1, 4)
    )
    assert items.shape == values.shape == (0, 3)


def test_what_the_scorer_hands_out_is_not_written_to() -> None:
    popularity = torch.tensor([3.0, 1.0, 2.0])
    seen = interactions_of([(0, 0), (1, 2)], n_users=2, n_items=3)
    items, _ = recommend_top_k(lambda users: popularity.expand(len(users), -1), np.array([0, 1]), 2, seen)
    assert items.tolist() == [[2, 1], [0, 1]]
    assert popularity.tolist() == [3.0, 1.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda n_items: st.lists(
            st.lists(st.sampled_from([-np.inf, -1.0, 0.0, -0.0, 2.5]), min_size=n_items, max_size=n_items),
            min_size=1,
            max_size=4,
        )
    ),
    st.integers(1, 10),
)
def test_top_k_orders_equal_scores_by_the_lower_row(rows: list[list[float]], k: int) -> None:
    values, items = top_k(torch.tensor(rows), k)
    for row, scores in enumerate(rows):
        expected = sorted(range(len(scores)), key=lambda item: (-scores[item], item))[:k]
        assert items[row].tolist() == expected
        assert values[row].tolist() == [scores[item] for item in expected]


def test_top_k_is_exact_where_all_of_a_large_catalogue_ties() -> None:
    scores = torch.zeros(3, 5000)
    scores[1, 4000:] = 1
    scores[2] = torch.arange(5000) // 100
    assert top_k(scores, 150)[1].tolist() == [
        list(range(150)),
        list(range(4000, 4150)),
        [*range(4900, 5000), *range(4800, 4850)],
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_stop_with_the_user_and_advice(bad: float) -> None:
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = bad
    held_out = interactions_of([(0, 0), (1, 0)], 3, 4)
    with pytest.raises(TrainingError, match=f"User row 1 has a score of {bad}.*lower the learning rate"):
        evaluate(scorer_of(scores), held_out, interactions_of([], 3, 4), EvaluationConfig(ks=(1,)))


def test_an_evaluation_without_held_out_items_is_refused() -> None:
    nothing = interactions_of([], 3, 4)
    with pytest.raises(TrainingError, match="None of 3 users has held-out items"):
        evaluate(scorer_of(np.zeros((3, 4))), nothing, nothing, EvaluationConfig())


def test_scores_of_a_wrong_shape_and_lists_of_no_length_are_refused() -> None:
    nothing = interactions_of([], 3, 4)
    with pytest.raises(ValueError, match="expected \\(B, I\\) = \\(1, 4\\)"):
        recommend_top_k(lambda users: torch.zeros(len(users), 3), np.array([0]), 2, nothing)
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        recommend_top_k(scorer_of(np.zeros((3, 4))), np.array([0]), 0, nothing)


@pytest.mark.parametrize("ks", [(), (5, 5), (10, 5), (0, 5)])
def test_list_lengths_that_are_not_ascending_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        EvaluationConfig(ks=ks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_evaluation_on_a_gpu_equals_the_cpus() -> None:
    world = random_world(n_users=50, n_items=80)
    table = torch.from_numpy(tied_scores(world))
    config = EvaluationConfig(ks=(3, 10), block_users=16)
    on_cpu = evaluate(lambda users: table[users], world.split.test, world.split.train, config)
    on_gpu_table = table.cuda()
    on_gpu = evaluate(
        lambda users: on_gpu_table[users], world.split.test, world.split.train, config, device="cuda"
    )
    assert on_gpu.metrics == on_cpu.metrics
    assert on_gpu.per_user.equals(on_cpu.per_user)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_the_loop_over_pairs(ties: bool) -> None:
    world = random_world(n_users=20, n_items=30)
    scores = np.random.default_rng(1).standard_normal((20, 30), dtype=np.float32)
    if ties:
        scores = tied_scores(world)
    config = EvaluationConfig(ks=(5,), block_users=6, auc=True)
    result = evaluate(scorer_of(scores), world.split.test, world.split.train, config)
    relevant, seen = items_of(world.split.test), items_of(world.split.train)
    for row in result.per_user.iter_rows(named=True):
        user = row["user_row"]
        good = relevant[user]
        bad = set(range(30)) - good - seen.get(user, set())
        wins = [
            1.0 if scores[user, i] > scores[user, j] else 0.5 if scores[user, i] == scores[user, j] else 0.0
            for i in good
            for j in bad
            if i not in seen.get(user, set())
        ]
        assert row["auc"] == pytest.approx(sum(wins) / (len(good) * len(bad)), abs=1e-9)
    assert result.metrics["auc"] == pytest.approx(result.per_user["auc"].mean())


def test_candidates_leave_only_warm_or_only_cold_items() -> None:
    train = interactions_of([(0, 0), (1, 1)], n_users=2, n_items=5)
    test = interactions_of([(0, 1), (0, 3), (1, 4)], n_users=2, n_items=5)
    scores = np.array([[9, 8, 7, 6, 5], [9, 8, 7, 6, 5]], np.float32)
    cold = evaluate(
        scorer_of(scores), test, train, EvaluationConfig(ks=(2,), candidates="cold"), keep_lists=True
    )
    assert cold.lists is not None
    assert cold.lists.tolist() == [[2, 3], [2, 3]]
    assert cold.per_user["recall@2"].to_list() == [1.0, 0.0]
    warm = evaluate(
        scorer_of(scores), test, train, EvaluationConfig(ks=(2,), candidates="warm"), keep_lists=True
    )
    assert warm.lists is not None
    assert warm.lists.tolist() == [[1, -1]]
    assert warm.n_skipped == 1
    nothing = interactions_of([(0, 3)], n_users=2, n_items=5)
    with pytest.raises(TrainingError, match="has held-out items among the warm ones"):
        evaluate(scorer_of(scores), nothing, train, EvaluationConfig(ks=(2,), candidates="warm"))


def test_kept_lists_are_the_plain_ranking_with_its_hits() -> None:
    world = random_world(n_users=15, n_items=12)
    scores = np.random.default_rng(2).standard_normal((15, 12), dtype=np.float32)
    config = EvaluationConfig(ks=(3, 10), block_users=4)
    kept = evaluate(scorer_of(scores), world.split.test, world.split.train, config, keep_lists=True)
    assert kept.lists is not None
    assert kept.hits is not None
    relevant, seen = items_of(world.split.test), items_of(world.split.train)
    for place, user in enumerate(kept.per_user["user_row"].to_list()):
        ranking = plain_ranking(scores[user], seen.get(user, set()), 10)
        assert kept.lists[place].tolist() == ranking + [-1] * (10 - len(ranking))
        assert kept.hits[place].tolist() == [item in relevant[user] for item in kept.lists[place].tolist()]
    plain = evaluate(scorer_of(scores), world.split.test, world.split.train, config)
    assert plain.lists is None
    assert plain.metrics == kept.metrics


def test_ranking_metrics_equal_trec_eval_s() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="a development package")
    world = random_world(n_users=40, n_items=80)
    scores = np.random.default_rng(3).standard_normal((40, 80), dtype=np.float32)
    ks = (5, 10, 20)
    result = evaluate(scorer_of(scores), world.split.test, world.split.train, EvaluationConfig(ks=ks))
    relevant, seen = items_of(world.split.test), items_of(world.split.train)
    judged = {str(user): {str(item): 1 for item in items} for user, items in relevant.items()}
    run = {
        str(user): {
            str(item): float(scores[user, item]) for item in range(80) if item not in seen.get(user, set())
        }
        for user in relevant
    }
    lengths = ",".join(map(str, ks))
    asked = {f"recall.{lengths}", f"P.{lengths}", f"ndcg_cut.{lengths}", f"success.{lengths}", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, asked).evaluate(run)
    names = {"recall": "recall", "precision": "P", "ndcg": "ndcg_cut", "hit_rate": "success"}
    for row in result.per_user.iter_rows(named=True):
        other = theirs[str(row["user_row"])]
        for ours, name in names.items():
            for k in ks:
                assert row[f"{ours}@{k}"] == pytest.approx(other[f"{name}_{k}"], abs=1e-6), (ours, k)
        expected = other["recip_rank"] if other["recip_rank"] >= 1 / 20 else 0.0
        assert row["mrr@20"] == pytest.approx(expected, abs=1e-6)
