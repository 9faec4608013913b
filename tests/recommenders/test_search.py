"""Search of settings: what is tried, what is chosen, what ends early, and what a killed search leaves."""

from __future__ import annotations

import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from recommenders.errors import RecommenderError, SearchError, TrainingError
from recommenders.models.registry import MODELS, Setting, model_config
from recommenders.ranges import Between
from recommenders.search import (
    Measured,
    Trial,
    TrialFolder,
    Watch,
    best_trial,
    run_trials,
    trials_frame,
)
from recommenders.search_space import (
    Choice,
    SearchConfig,
    Space,
    all_points,
    check_range,
    n_points,
    search_space,
    with_choice,
)
from recommenders.training import TrainingConfig

SPACE: Space = {"layers": (1, 2, 3), "rate": Between(low=1e-4, high=1.0, log=True), "width": (8, 16)}
GRID: Space = {"layers": (1, 2, 3), "width": (8, 16)}
METHODS = ["grid", "random", "tpe"]


def worth(choice: Mapping[str, Setting]) -> float:
    """Best at layers 2, rate 0.01, width 16."""
    rate = float(choice.get("rate", 0.01))
    near = 1.0 - 0.1 * abs(int(choice["layers"]) - 2) - 0.1 * abs(math.log10(rate) + 2)
    return near - 0.3 * (choice["width"] == 8)


def planted(choice: Choice, watch: Watch, folder: Path) -> Measured:
    """Rises in twenty epochs to what the point is worth."""
    value = 0.0
    for epoch in range(1, 21):
        value = worth(choice) * epoch / 20
        if watch(epoch, value):
            return Measured(value, epoch, epoch, seconds=epoch / 10)
    return Measured(value, 20, 20, seconds=2.0)


def config(method: str = "random", n_trials: int = 12, **more: Any) -> SearchConfig:
    return SearchConfig.model_validate({"method": method, "n_trials": n_trials, "pruning": "none", **more})


def outcomes(trials: list[Trial]) -> list[tuple[object, ...]]:
    return [(t.number, t.choice, t.state, t.value, t.epochs, t.curve) for t in trials]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_spends_its_budget_on_different_points_of_the_space(method: str, tmp_path: Path) -> None:
    trials = run_trials(SPACE, planted, config(method), tmp_path)
    assert [trial.number for trial in trials] == list(range(12))
    assert all(list(trial.choice) == sorted(SPACE) for trial in trials)
    assert all(1e-4 <= float(trial.choice["rate"]) <= 1 for trial in trials)
    points = {tuple(trial.choice.values()) for trial in trials}
    assert len(points) == 12


@pytest.mark.parametrize("method", METHODS)
def test_a_small_space_is_tried_whole_each_point_once(method: str, tmp_path: Path) -> None:
    trials = run_trials(GRID, planted, config(method, n_trials=50), tmp_path)
    tried = sorted(tuple(trial.choice.values()) for trial in trials)
    assert tried == sorted(tuple(point.values()) for point in all_points(GRID))
    assert best_trial(trials).choice == {"layers": 2, "width": 16}


def test_a_grid_takes_five_values_of_a_range_ends_included(tmp_path: Path) -> None:
    assert Between(low=1e-4, high=1.0, log=True).spread(5) == (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    assert Between(low=5, high=1000).spread(5) == (5, 254, 502, 751, 1000)
    assert Between(low=1, high=2).spread(5) == (1, 2)
    assert n_points(SPACE, config("grid")) == 30
    assert n_points(SPACE, config("random")) is None
    trials = run_trials(SPACE, planted, config("grid", n_trials=30), tmp_path)
    assert best_trial(trials).choice == {"layers": 2, "rate": 0.01, "width": 16}


def test_tpe_gets_closer_to_a_planted_best_than_random_draws(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {"random": [], "tpe": []}
    for method, values in found.items():
        for seed in range(5):
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            trials = run_trials(SPACE, planted, config(method, n_trials=30, seed=seed), folder)
            values.append(best_trial(trials).value or 0.0)
    assert sum(found["tpe"]) > sum(found["random"])
    assert min(found["tpe"]) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_one_study_and_another_seed_another(method: str, tmp_path: Path) -> None:
    studies = []
    for place, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(place)
        folder.mkdir()
        chosen = config(method, seed=seed, pruning="median", warmup_epochs=2)
        studies.append(outcomes(run_trials(SPACE, planted, chosen, folder)))
    assert studies[0] == studies[1]
    assert studies[0] != studies[2]


@pytest.mark.parametrize("pruning", ["median", "halving"])
def test_pruning_ends_bad_trials_early_and_keeps_the_best(pruning: str, tmp_path: Path) -> None:
    for name in ("all", "some"):
        (tmp_path / name).mkdir()
    every = run_trials(SPACE, planted, config("random", n_trials=20), tmp_path / "all")
    some = run_trials(
        SPACE, planted, config("random", n_trials=20, pruning=pruning, warmup_epochs=5), tmp_path / "some"
    )
    pruned = [trial for trial in some if trial.state == "pruned"]
    assert [trial.choice for trial in some] == [trial.choice for trial in every]
    assert len(pruned) >= 5
    assert all(5 <= trial.epochs < 20 for trial in pruned)
    assert best_trial(some).choice == best_trial(every).choice
    assert sum(trial.epochs for trial in some) < 0.8 * sum(trial.epochs for trial in every)


def test_a_pruned_trial_is_never_chosen() -> None:
    trials = [
        Trial(number=0, choice={}, state="complete", value=0.2),
        Trial(number=1, choice={}, state="pruned", value=0.9),
        Trial(number=2, choice={}, state="complete", value=0.2),
    ]
    assert best_trial(trials).number == 0


def test_a_trial_that_fails_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    def diverges(choice: Choice, watch: Watch, folder: Path) -> Measured:
        if choice["layers"] == 3:
            raise TrainingError("The loss is nan.")
        if choice["layers"] == 2:
            return Measured(math.nan, 1, 1, 0.0)
        return planted(choice, watch, folder)

    trials = run_trials(GRID, diverges, config("grid"), tmp_path)
    assert [trial.state for trial in trials].count("failed") == 4
    assert {trial.reason for trial in trials} == {"", "The loss is nan.", "its value is nan"}
    assert best_trial(trials).choice == {"layers": 1, "width": 16}
    frame = trials_frame(trials)
    assert frame["value"].null_count() == 4
    assert frame["layers"].to_list() == [trial.choice["layers"] for trial in trials]


def test_where_every_trial_fails_the_reasons_are_told(tmp_path: Path) -> None:
    def fails(choice: Choice, watch: Watch, folder: Path) -> Measured:
        raise TrainingError("There is no validation pair.")

    trials = run_trials(GRID, fails, config("grid"), tmp_path)
    with pytest.raises(SearchError, match=r"None of 6 trials .* There is no validation pair\."):
        best_trial(trials)


def test_a_program_error_ends_the_search_and_its_point_is_tried_again(tmp_path: Path) -> None:
    def breaks(choice: Choice, watch: Watch, folder: Path) -> Measured:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_trials(GRID, breaks, config("grid"), tmp_path)
    assert TrialFolder(tmp_path).finished() == []
    assert len(run_trials(GRID, planted, config("grid"), tmp_path)) == 6


def test_no_trial_begins_after_the_time_budget(tmp_path: Path) -> None:
    trials = run_trials(SPACE, planted, config("random", time_budget_s=5.0), tmp_path)
    assert len(trials) == 3  # of two seconds each: the third begins at four
    assert len(run_trials(SPACE, planted, config("random", time_budget_s=5.0), tmp_path)) == 3


def test_a_space_of_nothing_is_one_trial(tmp_path: Path) -> None:
    def once(choice: Choice, watch: Watch, folder: Path) -> Measured:
        return Measured(0.5, 0, 0, 0.1)

    trials = run_trials({}, once, config("tpe"), tmp_path)
    assert [(trial.choice, trial.value) for trial in trials] == [({}, 0.5)]
    assert len(trials_frame(trials)) == 1


SCRIPT = """
import sys, time
from pathlib import Path
from tests.recommenders.test_search import SPACE, config, planted
from recommenders.search import Measured, run_trials

def slow(choice, watch, folder):
    mark = folder / "epoch"   # a checkpoint: what a killed trial has done
    first = int(mark.read_text()) if mark.exists() else 0
    def tell(epoch, value):
        if epoch > first:
            time.sleep(0.01)
            mark.write_text(str(epoch))
        return watch(epoch, value)
    return planted(choice, tell, folder)

settings = config(sys.argv[2], n_trials=10, pruning="median", warmup_epochs=3)
run_trials(SPACE, slow, settings, Path(sys.argv[1]))
"""


def worker(folder: Path, method: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), method], cwd=Path(__file__).parents[2]
    )


def wait_for_trials(folder: Path, count: int) -> None:
    limit = time.monotonic() + 60
    while len(list(folder.glob("trial-*.json"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_search_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    settings = config("tpe", n_trials=10, pruning="median", warmup_epochs=3)
    expected = run_trials(SPACE, planted, settings, whole)
    process = worker(killed, "tpe")
    wait_for_trials(killed, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_left = len(TrialFolder(killed).finished())
    assert 4 <= n_left < 10
    assert outcomes(run_trials(SPACE, planted, settings, killed)) == outcomes(expected)


@pytest.mark.slow
def test_two_processes_share_the_trials_of_one_search(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    whole.mkdir()
    shared.mkdir()
    workers = [worker(shared, "random") for _ in range(2)]
    assert [process.wait(60) for process in workers] == [0, 0]
    trials = TrialFolder(shared).finished()
    expected = run_trials(SPACE, planted, config("random", n_trials=10), whole)
    assert [trial.choice for trial in trials] == [trial.choice for trial in expected]
    assert len(list(shared.glob("claim-*.json"))) == 10


def _try_once(folder: Path) -> None:
    run_trials(GRID, _hangs, config("grid"), folder)


def _hangs(choice: Choice, watch: Watch, folder: Path) -> Measured:
    time.sleep(60)
    raise AssertionError


@pytest.mark.slow
def test_the_trial_of_a_live_process_is_left_to_it_and_that_of_a_dead_one_taken_over(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_try_once, args=(tmp_path,))
    process.start()
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("claim-*.json")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    others = run_trials(GRID, planted, config("grid"), tmp_path, wait=False)
    assert [trial.number for trial in others] == [1, 2, 3, 4, 5]
    process.kill()
    process.join()
    every = run_trials(GRID, planted, config("grid"), tmp_path)
    assert [trial.number for trial in every] == [0, 1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------ spaces


@pytest.mark.parametrize("model", MODELS)
def test_published_ranges_hold_values_the_model_can_take(model: str) -> None:
    for name, values in MODELS[model].search.items():
        check_range(model, name, values)


def test_every_model_with_settings_says_what_is_searched() -> None:
    bare = {name for name, entry in MODELS.items() if entry.config.model_fields and not entry.search}
    assert bare == set()


def test_a_user_s_ranges_replace_the_published_ones_setting_by_setting() -> None:
    chosen = config(ranges={"vbpr": {"l2": [0.5], "training": {"batch_size": {"low": 64, "high": 512}}}})
    space = search_space("vbpr", chosen)
    assert list(space) == ["l2", "l2_projection", "training.batch_size", "training.learning_rate"]
    assert space["l2"] == (0.5,)
    assert space["training.batch_size"] == Between(low=64, high=512)
    assert space["l2_projection"] == MODELS["vbpr"].search["l2_projection"]
    assert search_space("bpr", chosen) == dict(MODELS["bpr"].search)


def test_what_a_user_has_decided_is_not_searched() -> None:
    assert list(search_space("lightgcn", config(), {"l2": 0.1, "dim": 32})) == ["n_layers"]
    twice = config(ranges={"lightgcn": {"l2": [0.1]}})
    with pytest.raises(SearchError, match=r"l2 is set to 0\.5, and search\.ranges gives it a range"):
        search_space("lightgcn", twice, {"l2": 0.5})


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"vbprr": {"l2": [1.0]}}, "known models"),
        ({"vbpr": {"l3": [1.0]}}, r"search\.ranges\.vbpr\.l3: vbpr has no such setting; expected one of dim"),
        ({"vbpr": {"training.epoch": [1]}}, r"vbpr has no such setting"),
        ({"vbpr": {"training.monitor": ["ndcg@20"]}}, "choices are made by the monitor"),
        ({"vbpr": {"training.check_memory": [True]}}, r"vbpr has no such setting"),
        ({"bpr": {"loss": ["bpr", "hinge"]}}, r"search\.ranges\.bpr\.loss holds 'hinge': .* 'softmax'"),
        ({"bpr": {"training.negatives": ["rare"]}}, r"training\.negatives holds 'rare': .* 'in-batch'"),
        ({"vbpr": {"l2": []}}, r"search\.ranges\.vbpr\.l2 has no value"),
        ({"vbpr": {"l2": [0.1, -1.0]}}, r"l2 holds -1\.0: Input should be greater than or equal to 0"),
        ({"vbpr": {"dim": {"low": 0.5, "high": 2.5}}}, r"dim holds 0\.5: Input should be a valid integer"),
        ({"vbpr": {"training.learning_rate": {"low": 0.0, "high": 1.0}}}, r"holds 0\.0: .* greater than 0"),
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(RecommenderError, match=message):
        config(ranges=ranges)


@pytest.mark.parametrize("values", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": 1}])
def test_ends_that_make_no_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(ranges={"vbpr": {"l2": values}})


def test_a_choice_is_put_into_the_model_s_settings_and_those_of_training() -> None:
    settings, training = with_choice(
        "vbpr", {"dim": 8}, TrainingConfig(epochs=3), {"l2": 0.1, "training.learning_rate": 0.01}
    )
    assert settings == {"dim": 8, "l2": 0.1}
    assert training == TrainingConfig(epochs=3, learning_rate=0.01)
    assert model_config("vbpr", settings)


def test_negatives_and_losses_are_searched_like_other_settings() -> None:
    ranges = {"bpr": {"loss": ["bpr", "softmax"], "training": {"negatives": ["uniform", "in-batch"]}}}
    chosen = config(method="grid", ranges=ranges)
    space = {
        name: values
        for name, values in search_space("bpr", chosen).items()
        if name in {"loss", "training.negatives"}
    }
    tried = []
    for choice in all_points(space):
        settings, training = with_choice("bpr", {"dim": 8}, TrainingConfig(epochs=3), choice)
        tried.append((model_config("bpr", settings).loss, training.negatives))
    assert sorted(tried) == [
        ("bpr", "in-batch"),
        ("bpr", "uniform"),
        ("softmax", "in-batch"),
        ("softmax", "uniform"),
    ]
