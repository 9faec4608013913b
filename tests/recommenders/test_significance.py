"""Paired tests and intervals against plain loops, scipy and the textbooks' numbers."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recommenders import significance
from recommenders.significance import (
    Interval,
    bootstrap_interval,
    compare_paired,
    holm,
    mean_over_seeds,
    sign_flip_test,
    t_interval,
    wilcoxon_p,
)

DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Differences in height, in eighths of an inch, of crossed and self-fertilised maize: Fisher, The Design of
Experiments, 1935, sec. 21; 863 of the 32,768 ways to flip them sum to 314 or more."""

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Additional hours of sleep: Student, The probable error of a mean, 1908; mean 1.58, 0.70 to 2.46."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain_sign_flip(differences: list[float]) -> float:
    """All ways of flipping, one after the other."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(s >= seen - 1e-9 for s in sums) / len(sums)


# ------------------------------------------------------------------------------------- sign flips


def test_sign_flips_give_fishers_number_for_darwins_maize() -> None:
    test = sign_flip_test(DARWIN, rng(), n_permutations=2**15)
    assert (test.exact, test.n_flips) == (True, 2**15)
    assert test.p_value == 2 * 863 / 2**15


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3).map(lambda n: n / 10), min_size=1, max_size=9))
def test_exact_sign_flips_equal_the_plain_loop(differences: list[float]) -> None:
    assert sign_flip_test(differences, rng(), n_permutations=512).p_value == pytest.approx(
        plain_sign_flip(differences)
    )


def test_random_sign_flips_approach_the_exact_p_value() -> None:
    random = sign_flip_test(DARWIN, rng(), n_permutations=30_000)
    assert not random.exact
    assert random.p_value == pytest.approx(2 * 863 / 2**15, abs=0.004)


def test_sign_flips_agree_with_scipys_permutation_test() -> None:
    differences = rng(3).normal(0.2, 1, 12)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_test(differences, rng(), n_permutations=4096).p_value == pytest.approx(expected.pvalue)


def test_users_without_a_difference_change_nothing() -> None:
    with_zeros = np.concatenate([DARWIN, np.zeros(5_000)])
    assert sign_flip_test(with_zeros, rng(), n_permutations=2**15) == sign_flip_test(
        DARWIN, rng(), n_permutations=2**15
    )


def test_a_p_value_is_never_zero_and_one_when_nothing_differs() -> None:
    sure = sign_flip_test(np.ones(500), rng(), n_permutations=999)
    assert (sure.p_value, sure.n_flips, sure.exact) == (1 / 1000, 999, False)
    assert sign_flip_test(np.ones(3), rng(), n_permutations=999).p_value == 2 / 8
    assert sign_flip_test(np.zeros(50), rng()).p_value == 1.0


def test_sign_flips_of_equal_halves_are_counted_as_far_although_their_sums_round_differently() -> None:
    differences = np.array([0.1] * 3 + [0.3, -0.6])
    assert sign_flip_test(differences, rng(), n_permutations=32).p_value == 1.0
    assert sign_flip_test([0.1, 0.2, 0.3], rng(), n_permutations=8).p_value == 2 / 8


def test_false_alarms_are_as_rare_as_alpha_says() -> None:
    draws = rng(7)
    p_values = [
        sign_flip_test(draws.normal(0, 1, 40) * draws.uniform(0.1, 3, 40), draws, n_permutations=199).p_value
        for _ in range(400)
    ]
    assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.085
    assert 0.4 < np.mean(p_values) < 0.6


def test_block_sizes_do_not_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = rng(1).normal(0.05, 1, 101)
    whole = compare_paired(differences, np.zeros(101), rng(), n_permutations=500, n_resamples=300)
    exact = sign_flip_test(DARWIN, rng(), n_permutations=2**15)
    monkeypatch.setattr(significance, "_BLOCK_NUMBERS", 1000)
    assert compare_paired(differences, np.zeros(101), rng(), n_permutations=500, n_resamples=300) == whole
    assert sign_flip_test(DARWIN, rng(), n_permutations=2**15) == exact


def test_memory_does_not_grow_with_users_times_permutations() -> None:
    differences = rng(1).normal(0, 1, 20_000)
    tracemalloc.start()
    sign_flip_test(differences, rng(), n_permutations=1_000)
    bootstrap_interval(differences, rng(), n_resamples=1_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 40 * 2**20 < 20_000 * 1_000 * 8


def test_equal_seeds_give_equal_results() -> None:
    a, b = rng(1).random(200), rng(2).random(200)
    one, same, other = (
        compare_paired(a, b, rng(seed), n_permutations=200, n_resamples=100) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.difference.low != other.difference.low


# ------------------------------------------------------------------------------- the other tests


def test_wilcoxon_is_scipys_and_ignores_users_without_a_difference() -> None:
    assert wilcoxon_p(DARWIN) == pytest.approx(stats.wilcoxon(DARWIN).pvalue)
    assert wilcoxon_p(DARWIN + [0] * 40) == wilcoxon_p(DARWIN)
    assert wilcoxon_p([0.0, 0.0]) == 1.0


def test_wilcoxon_equals_the_plain_loop_over_all_sign_patterns() -> None:
    differences = [0.3, -0.1, 0.9, 1.4, -0.5, 2.0, 0.7, 1.1]
    ranks = stats.rankdata(np.abs(differences))
    seen = sum(rank if d > 0 else -rank for rank, d in zip(ranks, differences, strict=True))
    sums = [np.dot(signs, ranks) for signs in itertools.product([1, -1], repeat=8)]
    assert wilcoxon_p(differences) == pytest.approx(np.mean(np.abs(sums) >= abs(seen)))


def test_holm_steps_down_as_in_the_textbook() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.5]), [1.0, 1.0])
    assert holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_equals_the_plain_loop(p_values: list[float]) -> None:
    expected, so_far = [0.0] * len(p_values), 0.0
    ranked = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(ranked):
        so_far = max(so_far, (len(p_values) - rank) * p_values[place])
        expected[place] = min(1.0, so_far)
    np.testing.assert_allclose(holm(p_values), expected)


def test_holm_refuses_what_is_no_p_value() -> None:
    for p_values in ([0.1, 1.2], [math.nan], [-0.1]):
        with pytest.raises(ValueError, match="expected numbers in"):
            holm(p_values)


# ------------------------------------------------------------------------------------- intervals


def test_t_interval_gives_students_and_fishers_numbers() -> None:
    sleep = t_interval(SLEEP)
    assert (round(sleep.mean, 2), round(sleep.low, 2), round(sleep.high, 2)) == (1.58, 0.7, 2.46)
    maize = t_interval(DARWIN)
    assert (round(maize.mean, 2), round(maize.low, 2), round(maize.high, 2)) == (20.93, 0.03, 41.84)
    low, high = stats.ttest_1samp(SLEEP, 0).confidence_interval(0.9)
    assert (t_interval(SLEEP, level=0.9).low, t_interval(SLEEP, level=0.9).high) == pytest.approx((low, high))


def test_one_value_has_a_mean_and_no_interval() -> None:
    for interval in (t_interval([0.3]), bootstrap_interval([0.3], rng())):
        assert (interval.mean, interval.n) == (0.3, 1)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert not interval.excludes_zero


def test_bootstrap_interval_equals_the_plain_loop() -> None:
    values, draws = np.array(SLEEP), rng(4)
    means = [np.mean([values[place] for place in draws.integers(10, size=10)]) for _ in range(500)]
    interval = bootstrap_interval(values, rng(4), n_resamples=500)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_bootstrap_interval_of_many_users_is_students() -> None:
    values = rng(5).normal(0.1, 1, 4_000)
    bootstrap, student = bootstrap_interval(values, rng()), t_interval(values)
    assert bootstrap.mean == student.mean
    assert (bootstrap.low, bootstrap.high) == pytest.approx((student.low, student.high), abs=0.004)


def test_interval_excludes_zero_only_when_all_of_it_lies_on_one_side() -> None:
    assert Interval(1, 0.1, 2, 0.95, 9).excludes_zero
    assert Interval(-1, -2, -0.1, 0.95, 9).excludes_zero
    assert not Interval(1, -0.1, 2, 0.95, 9).excludes_zero
    assert not Interval(1, 0.0, 2, 0.95, 9).excludes_zero


# ----------------------------------------------------------------------------------------- pairs


def test_paired_comparison_reports_means_difference_and_who_is_better() -> None:
    a, b = np.array([0.5, 0.2, 0.0, 1.0]), np.array([0.0, 0.2, 0.1, 0.5])
    result = compare_paired(a, b, rng())
    assert (result.mean_a, result.mean_b) == pytest.approx((0.425, 0.2))
    assert result.difference.mean == pytest.approx(0.225)
    assert (result.n_better, result.n_worse, result.n_users) == (2, 1, 4)
    assert result.sign_flip.p_value == pytest.approx(plain_sign_flip([0.5, 0.0, -0.1, 0.5]))


def test_seeds_are_averaged_per_user_so_that_more_seeds_are_not_more_users() -> None:
    differences = rng(6).normal(0.12, 1, 100)
    seeds = [differences + rng(seed).normal(0, 0.01, 100) for seed in range(5)]
    averaged = mean_over_seeds(seeds)
    np.testing.assert_allclose(averaged, [np.mean([seed[user] for seed in seeds]) for user in range(100)])
    one_seed = sign_flip_test(seeds[0], rng()).p_value
    assert sign_flip_test(averaged, rng()).p_value == pytest.approx(one_seed, abs=0.02)
    assert sign_flip_test(np.concatenate(seeds), rng()).p_value < one_seed / 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_paired([1.0, 2.0], [1.0], rng()), "a has 2 users and b has 1"),
        (lambda: compare_paired([], [], rng()), r"values are \(0,\)"),
        (lambda: sign_flip_test([1.0, math.nan], rng()), "value 1 is not finite"),
        (lambda: sign_flip_test([1.0], rng(), n_permutations=0), "n_permutations is 0"),
        (lambda: mean_over_seeds([[1.0, 2.0], [1.0]]), r"seeds have \[2, 1\] users"),
        (lambda: mean_over_seeds([]), r"seeds have \[\] users"),
        (lambda: t_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap_interval([1.0, 2.0], rng(), n_resamples=0), "n_resamples is 0"),
        (lambda: wilcoxon_p([[1.0]]), r"values are \(1, 1\)"),
    ],
)
def test_what_cannot_be_tested_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
