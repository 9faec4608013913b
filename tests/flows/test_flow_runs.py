"""What a server records of a flow around a stage; the stage itself is a dummy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun

from flows.tasks import failed, run_stage, stage_task, value_of
from pipeline.errors import USER_ERRORS, DatasetError
from pipeline.store import Store
from tests.flows.dummy import ATTEMPTS, toy_flow, toy_stage

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
]


def recorded(state: State[Any]) -> tuple[FlowRun, list[TaskRun], list[Artifact]]:
    """What the server knows of a run."""
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(
            task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run_id]))
        )
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
        return client.read_flow_run(run_id), tasks, artifacts


def failing(before: Callable[[], None]) -> Callable[..., State[str]]:
    """A flow around the dummy stage that does ``before`` in the middle of its work."""

    @flow(name="failing", persist_result=False)
    def failing_flow(store: str) -> State[str]:
        return run_stage(
            "failing", store, lambda opened, reporter: toy_stage(opened, "red", reporter, before)
        )

    return failing_flow


def test_a_second_run_shows_that_nothing_was_computed(tmp_path: Path) -> None:
    store = str(tmp_path / "shop")
    first = toy_flow("green", store=store, return_state=True)
    second = toy_flow("green", store=store, return_state=True)
    assert (first.type, first.name) == ("COMPLETED", "Completed")
    assert (second.type, second.name) == ("COMPLETED", "Cached")
    assert value_of(first) == value_of(second) == Store(store).list()[0].ref
    run, _, _ = recorded(first)
    again, _, _ = recorded(second)
    assert (run.name, run.tags) == ("green", [])
    assert (again.name, again.tags) == ("green (reused)", ["reused"])


def test_a_run_leaves_a_page_a_table_a_link_and_its_progress(tmp_path: Path) -> None:
    state = toy_flow("violet", store=str(tmp_path / "shop"), return_state=True)
    _, _, artifacts = recorded(state)
    made = {artifact.key: artifact for artifact in artifacts}
    assert {key: artifact.type for key, artifact in made.items()} == {
        "toy-violet": "markdown",
        "toy-violet-figures": "table",
        "toy-violet-link": "markdown",  # what Prefect makes of a link
        "toy-progress": "progress",
    }
    assert str(made["toy-violet"].description).endswith("letters 6, share 0.1235")
    assert "dataset/violet-" in str(made["toy-violet-link"].data)
    assert made["toy-progress"].data == 100.0


def test_an_artefact_gets_the_name_the_run_asked_for(tmp_path: Path) -> None:
    toy_flow("blue", store=str(tmp_path / "shop"), name="sky")
    assert Store(tmp_path / "shop").get("sky").slug == "blue"


def test_a_mistake_fails_at_once_with_its_one_message(tmp_path: Path) -> None:
    def before() -> None:
        raise DatasetError("tables.items is empty; give the path of a file.")

    ATTEMPTS.clear()
    state = failing(before)(str(tmp_path), return_state=True)
    assert ATTEMPTS == ["red"]
    assert state.is_failed()
    assert state.message == "tables.items is empty; give the path of a file."
    with pytest.raises(DatasetError, match="items is empty"):
        state.result()


def test_a_network_that_comes_back_costs_a_retry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before() -> None:
        if len(ATTEMPTS) < 3:
            raise ConnectionResetError("peer")

    ATTEMPTS.clear()
    monkeypatch.setattr(stage_task, "retry_delay_seconds", [0, 0, 0])
    state = failing(before)(str(tmp_path), return_state=True)
    assert state.is_completed()
    assert ATTEMPTS == ["red"] * 3
    _, tasks, _ = recorded(state)
    assert [task.run_count for task in tasks] in ([3], [])  # the recorder lags behind the run


def test_a_bug_fails_at_once_and_keeps_its_own_error(tmp_path: Path) -> None:
    def before() -> None:
        raise ZeroDivisionError("a bug")

    ATTEMPTS.clear()
    state = failing(before)(str(tmp_path), return_state=True)
    assert ATTEMPTS == ["red"]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        state.result()


def test_a_subflow_hands_its_mistake_to_the_parent(tmp_path: Path) -> None:
    def before() -> None:
        raise DatasetError("no such file")

    @flow(name="parent", persist_result=False)
    def parent() -> State[str]:
        try:
            failing(before)(str(tmp_path))
        except USER_ERRORS as error:
            return failed(error)
        raise AssertionError("the subflow's error was lost")

    state = parent(return_state=True)
    assert (state.is_failed(), state.message) == (True, "no such file")
