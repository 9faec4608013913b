"""The real stages as flows, on a demo catalogue of forty products, twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun

from flows.build_index import build_index_flow
from flows.compare_features import compare_features_flow
from flows.extract_features import extract_features_flow
from flows.prepare_dataset import prepare_dataset_flow
from flows.reporting import TERMINAL
from flows.running import run_two_stage_with_prefect
from flows.tasks import value_of
from flows.train_recommender import train_recommender_flow
from flows.two_stage import two_stage_flow
from pipeline.config import RunConfig, parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.progress import SilentReporter
from pipeline.settings import inputs_of, settings_text
from pipeline.store import Store
from pipeline.two_stage import PlainStages, run_two_stage
from tests.flows.test_flow_runs import recorded

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
]
DEMO = {"demo": {"n_items": 40, "n_users": 60}}
CONFIG = parse_config(
    {
        "name": "small",
        "dataset": DEMO,
        "feature_sets": [{"image": "random:16", "text": "random:16"}],
        "recommenders": [{"model": "popularity"}, {"model": "itemknn_content"}],
        "seeds": [0],
    },
    RunConfig,
)


class Words(SilentReporter):
    """Keeps what is said to the terminal."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@dataclass(frozen=True)
class TwoRuns:
    """A flow's state in an empty store, and again."""

    store: str
    first: State[Any]
    again: State[Any]


@pytest.fixture(scope="module")
def two_stage_twice(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> TwoRuns:
    store = str(tmp_path_factory.mktemp("two-stage") / "shop")
    first, again = (
        two_stage_flow(settings=settings_text(CONFIG), store=store, return_state=True) for _ in range(2)
    )
    return TwoRuns(store, first, again)


def subflows(state: State[Any]) -> list[FlowRun]:
    parent = state.state_details.flow_run_id
    assert parent is not None
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]))
        )


def test_two_stage_runs_every_stage_as_a_subflow(two_stage_twice: TwoRuns) -> None:
    assert (two_stage_twice.first.name, two_stage_twice.first.message) == ("Completed", "6 stages, 0 reused")
    names = sorted(run.name for run in subflows(two_stage_twice.first))
    assert names == [
        "demo",
        "itemknn-content-random-16-image-text-seed-0",
        "popularity-seed-0",
        "random-16-image",
        "random-16-text",
        "recall-20-of-2-runs",
    ]


def test_a_second_two_stage_run_is_cached_in_all_its_parts(two_stage_twice: TwoRuns) -> None:
    assert (two_stage_twice.again.name, two_stage_twice.again.message) == ("Cached", "6 stages, 6 reused")
    again = subflows(two_stage_twice.again)
    assert {run.state_name for run in again} == {"Cached"}
    assert all(run.name.endswith("(reused)") and run.tags == ["reused"] for run in again)


def test_two_stage_shows_the_comparison_and_its_stages(two_stage_twice: TwoRuns) -> None:
    _, _, artifacts = recorded(two_stage_twice.first)
    made = {artifact.key: artifact for artifact in artifacts}
    assert set(made) == {"two-stage-small", "two-stage-small-stages"}
    comparison = Store(two_stage_twice.store).get("small", "comparison")
    assert comparison.path("comparison.md").read_text() in str(made["two-stage-small"].data)
    assert str(made["two-stage-small"].description).startswith("6 stages, 0 reused, ")
    assert "best on validation" in str(made["two-stage-small"].description)


def test_flows_make_the_very_artefacts_of_the_plain_functions(
    two_stage_twice: TwoRuns, tmp_path: Path
) -> None:
    plain = run_two_stage(CONFIG, PlainStages(Store(tmp_path)))
    flows = value_of(two_stage_twice.first)
    assert [stage.artefact.key for stage in plain.all()] == [stage.artefact.key for stage in flows.all()]
    assert [stage.summary for stage in flows.all()] == [
        stage.summary for stage in value_of(two_stage_twice.again).all()
    ]


def test_the_command_line_gets_the_plain_result_and_each_stage_s_line(two_stage_twice: TwoRuns) -> None:
    words = Words()
    result = run_two_stage_with_prefect(CONFIG, Store(two_stage_twice.store), reporter=words)
    assert all(stage.reused for stage in result.all())
    assert [line for line in words.said if line.strip().startswith("reused")] == [
        stage.line() for stage in result.all()
    ]
    assert TERMINAL.get() is not words


def test_a_mistake_in_a_stage_ends_the_whole_run_with_its_message(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dataset": DatasetConfig(importer="tables")})
    state = two_stage_flow(settings=settings_text(config), store=str(tmp_path), return_state=True)
    assert state.is_failed()
    assert state.message == "tables.items is empty; give the path of a file."


def small_training(model: str) -> dict[str, str]:
    return {"model": model, "settings": "training: {epochs: 2}"}


def test_each_stage_runs_alone_and_finds_its_input_by_name(tmp_path: Path, prefect_server: None) -> None:
    store = str(tmp_path / "shop")
    dataset = inputs_of(DatasetConfig.model_validate(DEMO), "importer")
    image = {"encoder": "random:16", "modality": "image"}
    steps: list[Callable[[], State[Any]]] = [
        lambda: prepare_dataset_flow(**dataset, name="toys", store=store, return_state=True),
        lambda: extract_features_flow("toys", **image, name="looks", store=store, return_state=True),
        lambda: build_index_flow("looks", store=store, return_state=True),
        lambda: train_recommender_flow(
            "toys",
            features="looks",
            **small_training("itemknn_content"),
            name="one",
            store=store,
            return_state=True,
        ),
        lambda: train_recommender_flow(
            "toys", **small_training("popularity"), name="two", store=store, return_state=True
        ),
        lambda: compare_features_flow("one, two", name="both", store=store, return_state=True),
    ]
    states = [step() for step in steps]
    assert [(state.name, state.message) for state in states if state.name != "Completed"] == []
    kinds = [Store(store).get(value_of(state)).kind for state in states]
    assert kinds == ["dataset", "features", "index", "run", "run", "comparison"]
    assert {step().name for step in steps} == {"Cached"}
    run, _, artifacts = recorded(states[3])
    table = next(artifact for artifact in artifacts if str(artifact.key).endswith("-figures"))
    assert run.name == "itemknn-content-random-16-image-seed-0"
    assert '"metric"' in str(table.data)
    assert '"test"' in str(table.data)


def test_an_unknown_dataset_fails_with_the_store_s_message(tmp_path: Path) -> None:
    state = extract_features_flow("toys", store=str(tmp_path), return_state=True)
    assert state.is_failed()
    assert "'toys'" in str(state.message)
