"""A stage's flow run inside another flow, in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import State
from prefect.settings import temporary_settings

from flows.tasks import CACHED, value_of
from pipeline.stages.result import StageResult
from pipeline.store import Store


def run_subflow(opened: Store, subflow: Callable[..., State[State[str]]], **parameters: Any) -> StageResult:
    """Run a stage as a subflow: keys go in, a reference comes back.

    Raises:
        Exception: What the stage failed with.
    """
    # The heartbeat of the parent speaks for its subflows; their own would cost a second each.
    with temporary_settings(updates={"flows.heartbeat_frequency": None}):
        state = subflow(**parameters, return_state=True)
    artefact = opened.get(value_of(state))
    summary = artefact.manifest.facts.get("summary", {})
    figures = dict(summary) if isinstance(summary, dict) else {}
    return StageResult(artefact, reused=state.name == CACHED, summary=figures)
