"""What a comparison says, what it chooses on, and what it refuses."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError
from scipy import stats

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.pairs import BEST, CONTROL, POPULAR, REFERENCE
from pipeline.comparison.parquet import pairs_frame, rows_frame
from pipeline.comparison.records import RunRecord
from pipeline.comparison.rows import floor_of, modalities
from pipeline.comparison.tables import Comparison, compare_runs
from pipeline.errors import ConfigError
from tests.pipeline.comparison_runs import N_USERS, demo_runs, record

QUICK = ComparisonConfig(n_permutations=2_000, n_resamples=200)


def asked(comparison: Comparison) -> list[tuple[str, str, str]]:
    return [(pair.a.label, pair.b.label, pair.question) for pair in comparison.pairs]


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_is_the_mean_over_seeds_with_its_spread_and_both_intervals() -> None:
    users = [[0.0, 0.2, 0.4, 1.0], [0.2, 0.2, 0.6, 1.0], [0.1, 0.2, 0.2, 0.9]]
    runs = [record(seed=seed, users=of_seed, valid=0.1 * seed) for seed, of_seed in enumerate(users)]
    row = compare_runs(runs, QUICK).rows[0]
    test, per_seed = row.test["recall@20"], np.mean(users, axis=1)
    assert row.seeds == (0, 1, 2)
    assert test.mean == pytest.approx(per_seed.mean())
    assert test.sd == pytest.approx(np.std(per_seed, ddof=1))
    for interval, values in ((test.over_seeds, per_seed), (test.over_users, np.mean(users, axis=0))):
        assert interval is not None
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    assert row.valid["recall@20"].mean == pytest.approx(0.1)
    np.testing.assert_allclose(row.per_user, np.mean(users, axis=0))


def test_users_are_matched_by_their_row_and_not_by_their_place() -> None:
    users = [0.1, 0.5, 0.9, 0.3, 0.7]
    mixed = record(seed=1, users=users)
    mixed = dataclasses.replace(mixed, per_user=mixed.per_user.sample(fraction=1, shuffle=True, seed=3))
    assert mixed.per_user["user_row"].to_list() != [0, 1, 2, 3, 4]
    row = compare_runs([record(seed=0, users=users), mixed], QUICK).rows[0]
    assert row.per_user.tolist() == users


def test_one_seed_has_no_spread_and_a_metric_without_users_no_interval() -> None:
    config = QUICK.model_copy(update={"more_metrics": ("coverage@20",)})
    row = compare_runs([record()], config).rows[0]
    assert math.isnan(row.test["recall@20"].sd)
    assert math.isnan(row.test["recall@20"].over_seeds.low)
    assert row.test["recall@20"].over_users is not None
    assert row.test["coverage@20"].over_users is None


def test_costs_are_means_over_seeds_and_memory_is_the_peak() -> None:
    runs = [
        record(seed=seed, facts={"train_seconds": 2.0 + seed, "peak_memory_bytes": seed}) for seed in (0, 2)
    ]
    assert compare_runs(runs, QUICK).rows[0].costs == {"train_seconds": 3.0, "peak_memory_bytes": 2}


def test_rows_stand_in_reading_order_whatever_the_order_of_the_runs() -> None:
    runs = demo_runs()
    expected = [
        "popularity",
        "bpr",
        "itemknn_content / tiny image+text",
        "itemknn_content / tiny image",
        "itemknn_content / random image+text",
        "itemknn_content / shuffled:tiny image+text",
        "vbpr / tiny image+text",
        "vbpr / tiny image",
        "vbpr / random image+text",
        "vbpr / shuffled:tiny image+text",
    ]
    first = compare_runs(runs, QUICK)
    assert [row.label for row in first.rows] == expected
    again = compare_runs([runs[place] for place in np.random.default_rng(0).permutation(len(runs))], QUICK)
    assert rows_frame(again).equals(rows_frame(first))
    assert pairs_frame(again).equals(pairs_frame(first))


def test_runs_of_other_settings_are_rows_of_their_own_named_by_what_differs() -> None:
    runs = [
        record(seed=seed, settings={"settings": {"dim": dim, "l2": 0.1}, "training": {"epochs": 9}})
        for dim, seed in itertools.product((16, 64), (0, 1))
    ]
    comparison = compare_runs([*runs, record("bpr", "-")], QUICK)
    assert [row.label for row in comparison.rows] == [
        "bpr",
        "vbpr (settings.dim=16) / tiny image+text",
        "vbpr (settings.dim=64) / tiny image+text",
    ]
    assert all(len(row.seeds) == 2 for row in comparison.rows[1:])


# ---------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(
    ("model", "feature_set", "floor"),
    [
        ("popularity", "-", "popularity"),
        ("bpr", "-", ""),
        ("vbpr", "tiny image+text", ""),
        ("itemknn_content", "tiny image", "content ItemKNN"),
        ("itemknn_content", "random image", "random or shuffled features"),
        ("vbpr", "random:512 image+text", "random or shuffled features"),
        ("vbpr", "shuffled:ViT-B-32:openai text", "random or shuffled features"),
        ("vbpr", "random image, shuffled:tiny text", "random or shuffled features"),
        ("vbpr", "random image, tiny text", ""),
        ("vbpr", "constant:8 image", "constant features"),
        ("vbpr", "randomized-net image", ""),
    ],
)
def test_a_floor_is_known_by_its_model_or_by_features_that_mean_nothing(
    model: str, feature_set: str, floor: str
) -> None:
    assert floor_of(model, feature_set) == floor


def test_modalities_are_read_from_the_name_of_a_feature_set() -> None:
    assert modalities("tiny image+text") == modalities("clip image, minilm text") == {"image", "text"}
    assert modalities("shuffled:tiny fused") == {"fused"}


def test_with_every_floor_a_comparison_is_controlled() -> None:
    assert compare_runs(demo_runs(), QUICK).missing_floors == []


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (lambda run: run.model == "popularity", ["popularity (`popularity`)"]),
        (
            lambda run: run.model == "itemknn_content" and "tiny image" in run.feature_set,
            ["content ItemKNN (`itemknn_content`)"],
        ),
        (
            lambda run: run.model == "vbpr" and run.feature_set.startswith(("random", "shuffled")),
            ["random or shuffled features for vbpr"],
        ),
        (
            lambda run: run.model != "bpr",
            [
                "popularity (`popularity`)",
                "content ItemKNN (`itemknn_content`)",
                "random or shuffled features",
            ],
        ),
    ],
)
def test_missing_floors_are_named(left_out: Any, missing: list[str]) -> None:
    runs = [run for run in demo_runs(seeds=[0]) if not left_out(run)]
    if any("content ItemKNN" in name for name in missing) and len(missing) == 1:
        runs = [run for run in runs if run.feature_set != "shuffled:tiny image+text" or run.model == "vbpr"]
    assert compare_runs(runs, QUICK).missing_floors == missing


# --------------------------------------------------------------------------------------------- choices


def test_permuting_test_figures_changes_neither_what_is_best_nor_what_is_tested() -> None:
    runs = demo_runs()
    comparison = compare_runs(runs, QUICK)
    for seed in range(5):
        donors = [runs[place] for place in np.random.default_rng(seed).permutation(len(runs))]
        permuted = [
            dataclasses.replace(run, test=donor.test, per_user=donor.per_user)
            for run, donor in zip(runs, donors, strict=True)
        ]
        other = compare_runs(permuted, QUICK)
        assert other.best.label == comparison.best.label == "vbpr / tiny image+text"
        assert {model: row.label for model, row in other.best_of_model.items()} == {
            model: row.label for model, row in comparison.best_of_model.items()
        }
        assert [row.label for row in other.rows] == [row.label for row in comparison.rows]
        assert asked(other) == asked(comparison)
        assert not rows_frame(other)["test"].equals(rows_frame(comparison)["test"])


def test_best_is_the_best_on_validation_even_if_it_is_the_worst_on_test() -> None:
    runs = [
        record(feature_set="tiny image", users=[0.1] * 5, valid=0.9),
        record(feature_set="tiny text", users=[0.9] * 5, valid=0.1),
    ]
    assert compare_runs(runs, QUICK).best.feature_set == "tiny image"


def test_equal_validation_prefers_features_that_mean_something() -> None:
    runs = [record(feature_set=name, valid=0.3) for name in ("constant image", "tiny text")]
    assert compare_runs(runs, QUICK).best.feature_set == "tiny text"


# ----------------------------------------------------------------------------------------------- pairs


def test_automatic_pairs_ask_about_the_best_the_controls_and_popularity() -> None:
    runs = [run for run in demo_runs(seeds=[0]) if run.model != "itemknn_content"]
    assert asked(compare_runs(runs, QUICK)) == [
        ("vbpr / tiny image+text", "vbpr / tiny image", BEST),
        ("vbpr / tiny image+text", "vbpr / random image+text", BEST),
        ("vbpr / tiny image+text", "vbpr / shuffled:tiny image+text", BEST),
        ("vbpr / tiny image", "vbpr / random image+text", CONTROL),
        ("bpr", "popularity", POPULAR),
        ("vbpr / tiny image+text", "popularity", POPULAR),
        ("vbpr / tiny image", "popularity", POPULAR),
    ]


def test_a_control_of_the_same_modalities_is_preferred_and_then_the_stronger_on_validation() -> None:
    runs = [
        record(feature_set="tiny image+text", valid=0.9),
        record(feature_set="tiny image", valid=0.8),
        record(feature_set="tiny text", valid=0.7),
        record(feature_set="random image", valid=0.1),
        record(feature_set="random image+text", valid=0.2),
        record(feature_set="shuffled:tiny image+text", valid=0.3),
        record(feature_set="constant image", valid=0.6),
    ]
    controls = [(a, b) for a, b, question in asked(compare_runs(runs, QUICK)) if question == CONTROL]
    assert controls == [
        ("vbpr / tiny image", "vbpr / random image"),
        ("vbpr / tiny text", "vbpr / shuffled:tiny image+text"),
    ]


def test_with_a_reference_every_other_row_is_tested_against_it() -> None:
    config = QUICK.model_copy(update={"reference": "bpr"})
    pairs = asked(compare_runs(demo_runs(seeds=[0]), config))
    assert len(pairs) == 9
    assert {(b, question) for _, b, question in pairs} == {("bpr", REFERENCE)}


def test_an_unknown_reference_is_refused_with_what_was_probably_meant() -> None:
    config = QUICK.model_copy(update={"reference": "vbpr / tiny images"})
    with pytest.raises(
        ConfigError, match=r"'vbpr / tiny images', which no row .*did you mean 'vbpr / tiny image'"
    ):
        compare_runs(demo_runs(seeds=[0]), config)
    with pytest.raises(ConfigError, match="the rows are: popularity; bpr"):
        compare_runs(demo_runs(seeds=[0]), QUICK.model_copy(update={"reference": "??"}))


def test_a_pair_averages_seeds_before_it_pairs_users() -> None:
    ours = [[0.0, 0.5, 1.0, 0.5], [0.5, 0.5, 1.0, 0.0]]
    theirs = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.5, 0.5, 0.0]]
    runs = [record(seed=seed, users=users) for seed, users in enumerate(ours)]
    runs += [record(feature_set="tiny image", seed=seed, users=users) for seed, users in enumerate(theirs)]
    (pair,) = compare_runs(runs, QUICK).pairs
    assert pair.result.difference.mean == pytest.approx((0.25 + 0.25 + 0.5 + 0.0) / 4)
    assert (pair.result.n_users, pair.result.n_better, pair.result.n_worse) == (4, 3, 0)
    assert pair.result.sign_flip.p_value == 2 / 8
    assert pair.p_holm == 2 / 8


def test_all_tests_of_a_table_are_one_family() -> None:
    comparison = compare_runs(demo_runs(), QUICK)
    p_values = [pair.result.sign_flip.p_value for pair in comparison.pairs]
    ranked = sorted(range(len(p_values)), key=lambda place: p_values[place])
    largest = 0.0
    for rank, place in enumerate(ranked):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        assert comparison.pairs[place].p_holm == pytest.approx(largest)
        assert comparison.pairs[place].significant == (largest < 0.05)
    assert {pair.significant for pair in comparison.pairs} == {True, False}


def test_a_row_more_does_not_change_the_p_values_of_the_others() -> None:
    few = compare_runs([run for run in demo_runs() if run.model != "bpr"], QUICK)
    all_pairs = {(p.a.label, p.b.label): p.result for p in compare_runs(demo_runs(), QUICK).pairs}
    assert few.pairs
    assert all(all_pairs[pair.a.label, pair.b.label] == pair.result for pair in few.pairs)


def test_another_seed_of_the_tests_changes_intervals_only_a_little() -> None:
    one = pairs_frame(compare_runs(demo_runs(), QUICK))
    other = pairs_frame(compare_runs(demo_runs(), QUICK.model_copy(update={"seed": 1})))
    assert one["difference"].equals(other["difference"])
    assert not one["difference_low"].equals(other["difference_low"])
    np.testing.assert_allclose(one["difference_low"], other["difference_low"], atol=0.03)


# ----------------------------------------------------------------------------------------------- notes


def test_a_recommender_that_does_not_listen_to_features_is_named() -> None:
    deaf = [
        record(feature_set="tiny image", valid=0.3),
        record(
            feature_set="random image",
            valid=0.29,
            users=record(feature_set="tiny image").user_values("recall@20"),
        ),
    ]
    (note,) = [note for note in compare_runs(deaf, QUICK).notes if "vbpr" in note]
    assert "not significantly better with tiny image than with random image" in note
    backwards = [record(feature_set="tiny image", valid=0.1), record(feature_set="random image", valid=0.2)]
    assert any("cannot rank feature sets" in note for note in compare_runs(backwards, QUICK).notes)


def test_unequal_and_single_seeds_and_too_few_permutations_are_noted() -> None:
    runs = [run for run in demo_runs() if run.model != "bpr" or run.seed == 0]
    notes = " ".join(compare_runs(runs, QUICK.model_copy(update={"n_permutations": 50})).notes)
    assert "between 1 and 3 seeds" in notes
    assert "no spread over seeds" in notes
    assert "tests of 50 permutations cannot become significant" in notes
    assert compare_runs(demo_runs(), QUICK).notes == []


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"split_fingerprint": "e" * 64}, "2 splits"),
        ({"dataset": "c" * 64}, "2 datasets"),
        ({"evaluation": {"mask_valid_in_test": True}}, "2 ways of measuring"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused_by_name(change: dict[str, Any], what: str) -> None:
    runs = [record(seed=seed) for seed in range(6)] + [record("bpr", "-", **change)]
    with pytest.raises(ConfigError) as refusal:
        compare_runs(runs, QUICK)
    message = str(refusal.value)
    assert f"The runs come from {what}" in message
    assert "run/bpr---seed-0" in message
    assert "run/vbpr-tiny image+text-seed-3 and 2 more" in message


def test_no_runs_and_a_run_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="no runs to compare"):
        compare_runs([], QUICK)
    twice = [record(label="run/a"), record(label="run/b")]
    with pytest.raises(ConfigError, match="run/a and run/b are both vbpr on tiny image\\+text with seed 0"):
        compare_runs(twice, QUICK)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metric": "recal@20"}, "not measured by 'recal@20'; it has recall@20"),
        ({"more_metrics": ("recall@7",)}, "not measured by 'recall@7'"),
        ({"metric": "coverage@20"}, "no 'coverage@20' of each user.*: recall@20, ndcg@20"),
    ],
)
def test_a_metric_that_runs_do_not_have_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_runs([record()], QUICK.model_copy(update=config))


def changed_users(run: RunRecord, **columns: object) -> RunRecord:
    return dataclasses.replace(run, per_user=run.per_user.with_columns(**columns))  # type: ignore[arg-type]  # expressions


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record("bpr", "-", users=[0.5] * 7), "measured on 7 users and .* on 60"),
        (changed_users(record("bpr", "-"), user_row=pl.col("user_row") + 1), "or on others"),
        (changed_users(record("bpr", "-"), user_row=pl.lit(3)), "users twice"),
        (
            changed_users(
                record("bpr", "-"),
                **{"recall@20": pl.when(pl.col("user_row") > 0).then(pl.col("recall@20"))},
            ),
            "without a number",
        ),
        (
            record("bpr", "-", test={"recall@20": 0.9, "ndcg@20": 0.1}),
            "says recall@20 is 0.900000 on test, but",
        ),
    ],
)
def test_users_that_cannot_be_paired_are_refused(other: RunRecord, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_runs([record(), other], QUICK)


def test_a_misspelt_setting_is_refused() -> None:
    for wrong in ({"metrics": ["recall@20"]}, {"alpha": 0}, {"alpha": 1}, {"n_permutations": 0}):
        with pytest.raises(ValidationError):
            ComparisonConfig.model_validate(wrong)
    assert ComparisonConfig(more_metrics=("recall@20", "mrr@20")).metrics == ("recall@20", "mrr@20")


def test_the_world_of_these_tests_has_as_many_users_as_it_says() -> None:
    assert compare_runs([record()], QUICK).n_users == N_USERS
