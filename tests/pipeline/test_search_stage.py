"""The stage that chooses settings: what it reads, what it leaves, and that test pairs change nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flows.cli import app
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import RunConfig, parse_config
from pipeline.console import EXIT_USER_ERROR, run_app
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.reading import read_dataset, read_for_choosing
from pipeline.searching import best_trials, search_document
from pipeline.stages import search_recommender as stage
from pipeline.stages.compare_features import compare_features, restore_comparison
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.search_recommender import SearchSettings, search_recommender, try_settings
from pipeline.stages.train_recommender import best_choice, train_recommender
from pipeline.store import Artefact, Store
from pipeline.two_stage import PlainStages, run_two_stage
from recommenders.errors import RecommenderError, SearchError
from recommenders.search_space import SearchConfig
from tests.pipeline.small_runs import SMALL_DATASET, SMALL_RUN

RANGES = {"vbpr": {"l2": [0.1, 0.01, 0.001], "training.learning_rate": [0.001, 0.01]}}


def settings(model: str = "vbpr", **search: Any) -> SearchSettings:
    raw = {
        "model": model,
        "settings": {"dim": 4} if model == "vbpr" else {},
        "training": {"epochs": 4, "monitor": "recall@5"},
        "evaluation": {"ks": [5, 10]},
        "search": {"n_trials": 5, "warmup_epochs": 1, "warmup_trials": 2, "ranges": RANGES, **search},
    }
    return parse_config(raw, SearchSettings)


@dataclass(frozen=True)
class Shop:
    """A store with a small dataset and features of it."""

    store: Store
    dataset: Artefact
    features: list[str]


def shop_at(folder: Path) -> Shop:
    store = Store(folder)
    dataset = prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact
    text = extract_features(store, dataset.key, FeaturesConfig(encoder="random:8", modality="text"))
    return Shop(store, dataset, [text.artefact.key])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return shop_at(tmp_path_factory.mktemp("search") / "store")


@pytest.fixture(scope="module")
def found(shop: Shop) -> Artefact:
    return search_recommender(shop.store, shop.dataset.key, shop.features, settings()).artefact


def study(search: Artefact) -> pl.DataFrame:
    return pl.read_parquet(search.path(stage.STUDY_FILE)).drop("seconds")


def test_a_search_keeps_every_trial_and_what_was_chosen(shop: Shop, found: Artefact) -> None:
    trials = pl.read_parquet(found.path(stage.STUDY_FILE))
    best = trials.filter(pl.col("state") == "complete").sort("value", descending=True).row(0, named=True)
    chosen = best_choice(found)
    assert len(trials) == 5
    assert {"state", "value", "epochs", "seconds", "curve", "l2", "training.learning_rate"} <= set(
        trials.columns
    )
    assert chosen == {name: best[name] for name in ("l2", "l2_projection", "training.learning_rate")}
    assert found.manifest.facts["best"] == {
        "number": best["number"],
        "value": best["value"],
        "settings": chosen,
    }
    assert [ref.kind for ref in found.manifest.inputs] == ["dataset", "features"]
    assert found.manifest.facts["trials"] == {
        "complete": int((trials["state"] == "complete").sum()),
        "pruned": int((trials["state"] == "pruned").sum()),
        "failed": 0,
    }
    assert best_trials(found)[0]["number"] == best["number"]
    assert json.loads(json.dumps(search_document(found)))["best"] == found.manifest.facts["best"]


def test_a_search_is_made_once_and_by_its_own_key(shop: Shop, found: Artefact) -> None:
    again = search_recommender(shop.store, shop.dataset.key, shop.features, settings())
    others = settings(ranges={**RANGES, "bpr": {"l2": [0.1]}})  # of another model
    assert again.reused
    assert again.artefact == found
    assert search_recommender(shop.store, shop.dataset.key, shop.features, others).reused
    other = search_recommender(shop.store, shop.dataset.key, shop.features, settings(n_trials=2))
    assert other.artefact.key != found.key
    assert len(study(other.artefact)) == 2


def test_the_chosen_trial_is_the_run_that_follows_it(shop: Shop, found: Artefact) -> None:
    run = train_recommender(
        shop.store, shop.dataset.key, shop.features, settings().run(), search=found.key
    ).artefact
    metrics = pl.read_parquet(run.path("metrics.parquet"))
    value = metrics.filter(pl.col("part") == "valid", pl.col("metric") == "recall@5")["value"].item()
    shown = run.manifest.parameters
    assert value == found.manifest.facts["best"]["value"]  # type: ignore[index, call-overload]
    assert best_choice(found).items() >= {"l2": shown["settings"]["l2"]}.items()  # type: ignore[index, call-overload]
    assert found.as_input("settings") in run.manifest.inputs
    assert run.manifest.facts["search_trials"] == 5
    plain = train_recommender(shop.store, shop.dataset.key, shop.features, settings().run()).artefact
    assert plain.key != run.key
    assert "search" not in plain.manifest.parameters


def test_a_choice_serves_only_what_was_searched(shop: Shop, found: Artefact, tmp_path: Path) -> None:
    longer = (
        settings().run().model_copy(update={"training": settings().training.model_copy(update={"epochs": 9})})
    )
    with pytest.raises(ConfigError, match="a search with another training;"):
        train_recommender(shop.store, shop.dataset.key, shop.features, longer, search=found.key)
    image = extract_features(
        shop.store, shop.dataset.key, FeaturesConfig(encoder="random:8", modality="image")
    )
    with pytest.raises(ConfigError, match="a search with another features;"):
        train_recommender(
            shop.store, shop.dataset.key, [image.artefact.key], settings().run(), search=found.key
        )


# ------------------------------------------------------------------------------- the test part


def with_other_test_pairs(shop: Shop, seed: int) -> Artefact:
    """The same dataset, training and validation, with other users' and items' rows in the test part."""
    rng = np.random.default_rng(seed)
    table = pl.read_parquet(shop.dataset.path("interactions.parquet"))
    n_items = len(pl.read_parquet(shop.dataset.path("items.parquet")))
    is_test = (table["split"] == "test").to_numpy()
    items, users = table["item_row"].to_numpy().copy(), table["user_row"].to_numpy().copy()
    items[is_test] = rng.integers(n_items, size=is_test.sum())
    users[is_test] = rng.permutation(users[is_test])
    changed = table.with_columns(
        pl.Series("item_row", items, table["item_row"].dtype),
        pl.Series("user_row", users, table["user_row"].dtype),
    )

    def make(draft: Any) -> None:
        for name in shop.dataset.manifest.files:
            target = draft.path(name)
            target.write_bytes(shop.dataset.path(name).read_bytes())
        changed.write_parquet(draft.path("interactions.parquet"))
        draft.record(**shop.dataset.manifest.facts)

    return shop.store.produce("dataset", slug="other-test", identity={"seed": seed}, make=make).artefact


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_test_pairs_change_no_trial_and_no_choice(method: str, shop: Shop) -> None:
    config = settings(method=method, n_trials=6)
    ours = search_recommender(shop.store, shop.dataset.key, shop.features, config).artefact
    for seed in (1, 2):
        dataset = with_other_test_pairs(shop, seed)
        before, after = (read_dataset(artefact).split for artefact in (shop.dataset, dataset))
        assert not np.array_equal(before.test.keys(), after.test.keys())  # the premise
        assert np.array_equal(before.train.keys(), after.train.keys())
        assert np.array_equal(before.valid.keys(), after.valid.keys())
        theirs = search_recommender(shop.store, dataset.key, shop.features, config).artefact
        assert theirs.key != ours.key
        assert study(theirs).equals(study(ours))
        assert theirs.manifest.facts["best"] == ours.manifest.facts["best"]


def test_other_validation_pairs_change_the_trials(shop: Shop) -> None:
    """Else the test above would pass for a search that looks at nothing."""
    table = pl.read_parquet(shop.dataset.path("interactions.parquet"))
    swapped = table.with_columns(pl.col("split").replace({"valid": "test", "test": "valid"}).alias("split"))

    def make(draft: Any) -> None:
        for name in shop.dataset.manifest.files:
            draft.path(name).write_bytes(shop.dataset.path(name).read_bytes())
        swapped.write_parquet(draft.path("interactions.parquet"))
        draft.record(**shop.dataset.manifest.facts)

    dataset = shop.store.produce("dataset", slug="swapped", identity={"swapped": 1}, make=make).artefact
    ours = search_recommender(shop.store, shop.dataset.key, shop.features, settings()).artefact
    theirs = search_recommender(shop.store, dataset.key, shop.features, settings()).artefact
    assert not study(theirs)["value"].equals(study(ours)["value"])


def test_the_stage_never_reads_test_pairs(shop: Shop) -> None:
    data = read_for_choosing(shop.dataset)
    split = read_dataset(shop.dataset).split
    assert not hasattr(data, "test")
    assert np.array_equal(data.train.keys(), split.train.keys())
    assert np.array_equal(data.valid.keys(), split.valid.keys())


# ------------------------------------------------------------------------------ killed, and shared

SCRIPT = """
import sys
from pipeline.stages.search_recommender import search_recommender, try_settings
from pipeline.store import Store
from tests.pipeline.test_search_stage import settings
folder, dataset, features, worker = sys.argv[1:]
if worker:
    try_settings(Store(folder), dataset, [features], settings(n_trials=6), worker)
else:
    search_recommender(Store(folder), dataset, [features], settings(n_trials=6))
"""


def process(shop: Shop, worker: str = "") -> subprocess.Popen[bytes]:
    url = shop.store.url
    command = [sys.executable, "-c", SCRIPT, url, shop.dataset.key, shop.features[0], worker]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def finished(shop: Shop) -> list[Path]:
    return sorted(Path(shop.store.url).rglob("trial-*.json"))


@pytest.mark.slow
def test_a_killed_search_goes_on_and_chooses_as_if_it_had_not_been(shop: Shop, tmp_path: Path) -> None:
    whole = search_recommender(shop.store, shop.dataset.key, shop.features, settings(n_trials=6)).artefact
    other = shop_at(tmp_path / "store")
    assert other.dataset.key == shop.dataset.key
    killed = process(other)
    limit = time.monotonic() + 120
    while not finished(other):
        assert time.monotonic() < limit
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.store.list("search") == []
    assert 1 <= len(finished(other)) < 6
    resumed = search_recommender(other.store, other.dataset.key, other.features, settings(n_trials=6))
    assert resumed.artefact.key == whole.key
    assert study(resumed.artefact).equals(study(whole))
    assert finished(other) == []  # cleared away


@pytest.mark.slow
def test_two_workers_try_all_settings_and_the_stage_only_chooses(tmp_path: Path) -> None:
    shop = shop_at(tmp_path / "store")
    workers = [process(shop, worker=f"worker {number}") for number in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    before = [path.read_bytes() for path in finished(shop)]
    assert len(before) == 6
    chosen = search_recommender(shop.store, shop.dataset.key, shop.features, settings(n_trials=6))
    values = [json.loads(each)["value"] for each in before]
    assert study(chosen.artefact)["value"].to_list() == values
    assert try_settings(shop.store, shop.dataset.key, shop.features, settings(n_trials=6), "late") == 0


# ------------------------------------------------------------------------------- models and runs


def test_a_model_without_training_is_searched_too(shop: Shop) -> None:
    config = settings("itemknn_content", n_trials=4, method="random")
    search = search_recommender(shop.store, shop.dataset.key, shop.features, config).artefact
    assert study(search)["state"].to_list() == ["complete"] * 4
    assert study(search)["epochs"].to_list() == [0] * 4


def test_where_no_trial_can_be_finished_it_is_told_and_can_be_tried_again(shop: Shop) -> None:
    config = settings("bpr").model_copy(
        update={"training": settings().training.model_copy(update={"monitor": "x"})}
    )
    for _ in range(2):
        with pytest.raises(
            SearchError, match=r"None of 5 trials could be finished.*training\.monitor is 'x'"
        ):
            search_recommender(shop.store, shop.dataset.key, [], config)
    assert finished(shop) == []


def test_a_range_for_a_setting_that_is_given_is_refused_at_the_door() -> None:
    raw = SMALL_RUN | {"search": {"ranges": {"vbpr": {"dim": [2, 4]}}}}
    with pytest.raises(RecommenderError, match=r"vbpr: dim is set to 4, and search\.ranges gives it a range"):
        parse_config(raw, RunConfig)
    with pytest.raises(ConfigError, match=r"search\.trials: unknown key"):
        parse_config(SMALL_RUN | {"search": {"trials": 3}}, RunConfig)


@pytest.fixture(scope="module")
def searched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Any]:
    search = {"n_trials": 3, "method": "random", "ranges": RANGES}
    config = parse_config(SMALL_RUN | {"search": search}, RunConfig)
    store = Store(tmp_path_factory.mktemp("run") / "store")
    return store, run_two_stage(config, PlainStages(store))


def test_a_run_searches_each_recommender_on_each_feature_set_with_one_budget(
    searched_run: tuple[Store, Any],
) -> None:
    _, result = searched_run
    searched = [
        (search.artefact.manifest.parameters["model"], search.artefact.manifest.facts["n_trials"])
        for search in result.searches
    ]
    assert searched == [("itemknn_content", 3)] * 3 + [("vbpr", 3)] * 3  # popularity has nothing to search
    keys = {search.artefact.key for search in result.searches}
    for run in result.runs:
        behind = [ref.key for ref in run.artefact.manifest.inputs if ref.kind == "search"]
        assert len(behind) == (run.artefact.manifest.parameters["model"] != "popularity")
        assert keys >= set(behind)


def test_the_comparison_tells_of_trials_and_keeps_one_recommender_over_its_feature_sets(
    searched_run: tuple[Store, Any],
) -> None:
    _, result = searched_run
    page = result.comparison.artefact.path("comparison.md").read_text()
    assert "Settings were searched for 6 of 7 rows, 3 trials each, and chosen on validation" in page
    assert "| trials |" in page
    comparison = restore_comparison(result.comparison.artefact)
    assert {row.recommender for row in comparison.rows} == {"popularity", "itemknn_content", "vbpr"}
    assert {row.costs.get("search_trials") for row in comparison.rows} == {None, 3.0}
    assert not [note for note in comparison.notes if "budget" in note or "not searched" in note]


def test_rows_of_unlike_tuning_are_told_apart(shop: Shop, found: Artefact) -> None:
    data, features, config = shop.dataset.key, shop.features, settings().run()
    longer = search_recommender(shop.store, data, features, settings(n_trials=2)).artefact
    runs = [
        train_recommender(shop.store, data, features, config, search=search).artefact.key
        for search in ("", found.key, longer.key)
    ]
    compared = ComparisonConfig(metric="recall@5", more_metrics=("ndcg@5",))
    comparison = restore_comparison(compare_features(shop.store, runs, compared).artefact)
    assert sorted(row.recommender for row in comparison.rows) == [
        "vbpr",
        "vbpr (searched, tpe of 2)",
        "vbpr (searched, tpe of 5)",
    ]
    assert any("different budgets, which favours the larger" in note for note in comparison.notes)
    assert any("Settings of vbpr were not searched" in note for note in comparison.notes)


def test_a_run_searches_where_it_is_asked_to() -> None:
    assert not RunConfig().search.enabled
    assert parse_config({"search": {"enabled": True}}, RunConfig).search.plain() == SearchConfig()
    assert parse_config({"search": {"n_trials": 7}}, RunConfig).search.enabled
    assert not parse_config({"search": {"n_trials": 7, "enabled": False}}, RunConfig).search.enabled


# ---------------------------------------------------------------------------------- command line


def tandem(shop: Shop, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_app(app, [*arguments, "--store", shop.store.url])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_shows_the_best_trials_and_names_the_search_for_a_run(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["search", shop.dataset.ref, "-f", shop.features[0], "--model", "vbpr", "--trials", "7"]
    asked += ["--method", "random", "--name", "tuned", "--set", "training.epochs=2"]
    asked += ["--set", "search.ranges.vbpr.training.learning_rate=[0.001]"]
    code, out, _ = tandem(shop, capsys, *asked)
    assert code == 0
    assert "vbpr on random:8 text: best of 7 trials (random)" in out
    assert "Chosen (*) on validation; test was not read." in out
    assert sum("of 2 " in line for line in out.splitlines()) == 5
    code, out, _ = tandem(shop, capsys, *asked, "--json")
    document = json.loads(out)
    assert document["reused"]
    assert len(document["best_trials"]) == 5
    assert document["best"]["settings"]["training.learning_rate"] == 0.001
    assert document["trials"] == {"complete": 7, "failed": 0, "pruned": 0}
    train = ["train", shop.dataset.ref, "-f", shop.features[0], "--search", "tuned", "--seed", "3"]
    code, out, _ = tandem(shop, capsys, *train, "--json")
    run = shop.store.get(json.loads(out)["key"], "run").manifest.parameters
    assert (run["seed"], run["search"]["key"]) == (3, document["key"])  # type: ignore[index, call-overload]
    code, _, err = tandem(shop, capsys, *train, "--set", "training.epochs=9")
    assert code == EXIT_USER_ERROR
    assert "a search with another training" in err


def test_a_range_of_nothing_is_one_message(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["search", shop.dataset.ref, "--model", "bpr", "--set", "search.ranges.bpr.l3=[1]"]
    code, _, err = tandem(shop, capsys, *asked)
    assert code == EXIT_USER_ERROR
    assert "bpr has no such setting; expected one of loss, temperature, uniformity_weight, dim, l2" in err
