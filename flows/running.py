"""``tandem run``: a configuration as a flow, on the server that is up or on one that lives during the run.

Nothing here imports prefect before its environment is set; import this module, not the flow's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flows.server.environment import client_environment
from flows.server.places import running_server, state_home
from pipeline.progress import SILENT, Reporter
from pipeline.settings import settings_text

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.joint_way import JointResult, JointWayConfig
    from pipeline.paradigms.config import ParadigmsConfig
    from pipeline.paradigms.way import ParadigmsResult
    from pipeline.store import Store
    from pipeline.two_stage import TwoStageResult


def run_two_stage_with_prefect(
    config: RunConfig, store: Store, *, force: bool = False, reporter: Reporter = SILENT
) -> TwoStageResult:
    """Run a configuration as the flow ``two-stage`` in this process.

    Args:
        config: What to make.
        store: Where it is kept.
        force: Make every artefact again.
        reporter: Shown what the stages say, and each stage's line as it ends.

    Returns:
        What ``pipeline.two_stage.run_two_stage`` returns.

    Raises:
        PipelineError, FeatureError, RecommenderError: As the stages raise them.
    """
    with _ready(store, reporter):
        from flows.tasks import value_of  # noqa: PLC0415 - after the environment is set
        from flows.two_stage import two_stage_flow  # noqa: PLC0415

        text = settings_text(config)
        return value_of(two_stage_flow(settings=text, store=store.url, force=force, return_state=True))


def run_joint_with_prefect(
    config: JointWayConfig,
    store: Store,
    dataset: str,
    *,
    beside: Sequence[str] = (),
    name: str = "",
    force: bool = False,
    reporter: Reporter = SILENT,
) -> JointResult:
    """Run a joint training as the flow ``joint-training`` in this process.

    Args:
        config: What to train how.
        store: Where it is kept.
        dataset: Name, key or folder of a dataset artefact.
        beside: Feature artefacts that stay as they are.
        name: Name of the trained encoder; empty for none.
        force: Make every artefact again.
        reporter: Shown what the stages say, and each stage's line as it ends.

    Returns:
        What ``pipeline.joint_way.run_joint`` returns.

    Raises:
        PipelineError, FeatureError, RecommenderError: As the stages raise them.
    """
    with _ready(store, reporter):
        from flows.joint_training import joint_inputs, joint_training_flow  # noqa: PLC0415 - after the environment is set
        from flows.tasks import value_of  # noqa: PLC0415

        what = {"features": ", ".join(beside), "name": name, "store": store.url, "force": force}
        return value_of(joint_training_flow(dataset, **joint_inputs(config), **what, return_state=True))


def run_paradigms_with_prefect(
    config: ParadigmsConfig, store: Store, *, force: bool = False, reporter: Reporter = SILENT
) -> ParadigmsResult:
    """Run a study of paradigms as the flow ``paradigms`` in this process.

    Args:
        config: What is compared.
        store: Where it is kept.
        force: Make every artefact again.
        reporter: Shown what the stages say, and each stage's line as it ends.

    Returns:
        What ``pipeline.paradigms.way.run_paradigms`` returns.

    Raises:
        PipelineError, FeatureError, RecommenderError: As the stages raise them.
    """
    with _ready(store, reporter):
        from flows.paradigms import paradigms_flow  # noqa: PLC0415 - after the environment is set
        from flows.tasks import value_of  # noqa: PLC0415

        text = settings_text(config)
        return value_of(paradigms_flow(settings=text, store=store.url, force=force, return_state=True))


@contextmanager
def _ready(store: Store, reporter: Reporter) -> Iterator[None]:
    """Choose the server, and show what flows say as everything else is shown."""
    if "prefect" not in sys.modules:  # else somebody chose the server already
        _choose_server(store.url, reporter)
    from flows.reporting import TERMINAL  # noqa: PLC0415 - after the environment is set

    _quiet()
    token = TERMINAL.set(reporter)
    try:
        yield
    finally:
        TERMINAL.reset(token)


def choose_running_server(store: str) -> str:
    """Talk to the server of this store from here on, if it is up; returns its address, "" where none is."""
    api_url = running_server(store)
    if api_url and "prefect" not in sys.modules:
        os.environ.update(client_environment(state_home(store), api_url))
    return api_url


def _choose_server(store: str, reporter: Reporter) -> None:
    """Set the environment for the server that answers, else for a temporary one with the same database."""
    named = os.environ.get("PREFECT_API_URL", "")
    api_url = running_server(store)
    home = state_home(store)
    home.mkdir(parents=True, exist_ok=True)
    if api_url:
        reporter.say(f"Prefect: {api_url.removesuffix('/api')} shows this run")
    else:
        silent = f"{named} does not answer; " if named else ""
        reporter.say(
            f"Prefect: {silent}a temporary server starts (10 to 30 s; "
            "`tandem up` keeps one, --no-prefect needs none)"
        )
    os.environ.pop("PREFECT_API_URL", None)
    os.environ.update(client_environment(home, api_url))
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")


def _quiet() -> None:
    """Keep Prefect's log in the UI: the terminal shows the stages' own words, and warnings of any package."""
    logging.getLogger("prefect").propagate = False
    for handler in logging.getLogger().handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
