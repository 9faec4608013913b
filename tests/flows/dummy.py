"""A stage of nothing: what a flow does around a stage, without a stage's work."""

from __future__ import annotations

from collections.abc import Callable

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.progress import Reporter
from pipeline.stages.result import StageResult
from pipeline.store import Draft, Store

ATTEMPTS: list[str] = []
"""One entry each time the stage computes or fails."""


def toy_stage(
    store: Store, colour: str, reporter: Reporter, before: Callable[[], None] = lambda: None
) -> StageResult:
    """Keep a colour in a file, as an artefact of kind dataset."""

    def make(draft: Draft) -> None:
        ATTEMPTS.append(colour)
        before()
        with reporter.progress("painting") as progress:
            for done in range(3):
                progress(done + 1, 3)
        draft.path("colour.txt").write_text(colour)
        draft.record(summary={"letters": len(colour), "share": 0.123456})

    reporter.say(f"  the colour is {colour}")
    outcome = store.produce("dataset", slug=colour, identity={"colour": colour}, make=make)
    return StageResult.of(outcome)


@flow(name="toy", flow_run_name="{colour}", persist_result=False)
def toy_flow(colour: str = "blue", *, store: str = "", name: str = "") -> State[str]:
    """Keep a colour.

    Args:
        colour: Any word.
        store: Where it is kept.
        name: What it is called.
    """
    return run_stage(
        "toy",
        store,
        lambda opened, reporter: toy_stage(opened, colour, reporter),
        name=name,
        following=lambda result: [NextStep("Again", "not served", {"colour": result.artefact.slug})],
    )
