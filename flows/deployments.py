"""What is served: a deployment per flow and of its name; ``python -m flows.deployments`` registers them."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import ParameterSchema

from flows.forms import FORMS, Choices, choices, form_schema
from flows.server.places import default_store
from flows.server.pool import CPU, GPU, POOL, Queue, prepare_pool
from flows.server.worker import wait_for_api
from pipeline.kept import KeptDeployment, deployments
from pipeline.store import Store

ENGINE = "python -m prefect.engine"
"""Prefect's own command prepares a folder and its dependencies in a process before this one, which a package
that is installed does not need: naming the command saves that process, about three seconds a run."""


@dataclass(frozen=True)
class Served:
    """A flow as it is offered in the UI."""

    module: str
    function: str
    queue: Queue
    tags: tuple[str, ...]
    schedule: Schedule | None = None

    def load(self) -> Flow[..., Any]:
        """Import the flow; only now, because a flow's configuration types import torch."""
        flow: Flow[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return flow


NIGHTLY = Cron("0 3 * * *", timezone="UTC", active=False, slug="nightly")
"""An example to switch on: with a fixed configuration every stage is reused until its input changes."""

DEPLOYED = "deployed"
"""Slug of the schedule that `tandem deploy` gives."""

SERVED = {
    "prepare-dataset": Served("flows.prepare_dataset", "prepare_dataset_flow", CPU, ("stage",)),
    "finetune-encoder": Served("flows.finetune_encoder", "finetune_encoder_flow", GPU, ("stage", "gpu")),
    "extract-features": Served("flows.extract_features", "extract_features_flow", GPU, ("stage", "gpu")),
    "build-index": Served("flows.build_index", "build_index_flow", GPU, ("stage", "gpu")),
    "search-recommender": Served(
        "flows.search_recommender", "search_recommender_flow", GPU, ("stage", "gpu")
    ),
    "train-recommender": Served("flows.train_recommender", "train_recommender_flow", GPU, ("stage", "gpu")),
    "compare-features": Served("flows.compare_features", "compare_features_flow", CPU, ("stage",)),
    "joint-training": Served("flows.joint_training", "joint_training_flow", GPU, ("pipeline", "gpu")),
    "paradigms": Served("flows.paradigms", "paradigms_flow", GPU, ("pipeline", "gpu")),
    "two-stage": Served("flows.two_stage", "two_stage_flow", GPU, ("pipeline", "gpu"), NIGHTLY),
}
"""Flow name -> how it is served. Flows tagged ``pipeline`` run their stages as subflows inside their own
process, so that each holds the one place of the gpu queue itself and waits for nobody who would need it."""


@dataclass(frozen=True)
class Deployment:
    """A flow as it is registered: its form, the inputs that are filled in, and its schedule."""

    served: Served
    name: str
    folder: Path
    """Where relative paths in its inputs start."""
    inputs: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    """The one it begins with."""
    reschedule: bool = False
    """Whether that schedule counts although the server holds others: its own place is taken by slug."""
    overlap: str = ""

    async def register(self, client: PrefectClient, offered: Choices) -> str:
        """Register it with the server; schedules and the on/off switch set in the UI are kept.

        Returns:
            The full name, ``flow/deployment``.
        """
        flow = self.served.load()
        deployment = await flow.ato_deployment(
            self.name,  # the list in the UI shows it in large letters, before the flow's own name
            description=describe(flow, self.inputs),
            work_pool_name=POOL,
            work_queue_name=self.served.queue.name,
            parameters=self._complete(flow),
            tags=[*self.served.tags, *([f"overlap:{self.overlap}"] if self.overlap else [])],
            schedules=[self.schedule] if self.schedule else [],
            job_variables={"working_dir": str(self.folder.resolve()), "command": ENGINE},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        if flow.name in FORMS:
            deployment._parameter_openapi_schema = ParameterSchema(**form_schema(flow, offered))
        await keep_schedules(client, deployment, replace=self.reschedule)
        await deployment.aapply()
        return deployment.full_name

    def _complete(self, flow: Flow[..., Any]) -> dict[str, Any]:
        """All inputs, so that what is scheduled on the page has them, whatever its dialogs lose."""
        properties = flow.parameters.properties
        defaults = {name: shown["default"] for name, shown in properties.items() if "default" in shown}
        return {**defaults, **self.inputs} if self.inputs else {}


async def deploy(
    client: PrefectClient, served: Sequence[Served], working_dir: Path, offered: Choices | None = None
) -> list[str]:
    """Register flows with the server, each as a deployment of its own name, to be filled in.

    Args:
        client: The server's client.
        served: The flows.
        working_dir: The folder that relative paths in a flow's inputs start from.
        offered: What its form offers to choose.

    Returns:
        The full names, ``flow/deployment``.
    """
    return [
        await Deployment(entry, entry.load().name, working_dir, schedule=entry.schedule).register(
            client, offered or Choices()
        )
        for entry in served
    ]


async def deploy_kept(
    client: PrefectClient,
    store: Store,
    offered: Choices,
    names: Sequence[str] = (),
    *,
    reschedule: bool = False,
) -> list[str]:
    """Register what `tandem deploy` has kept in a store.

    Args:
        client: The server's client.
        store: Where it is kept.
        offered: What the forms offer to choose.
        names: Which; all of them by default.
        reschedule: Whether a schedule that is kept with it takes the place of the one it had before.

    Returns:
        The full names, ``flow/deployment``.
    """
    return [
        await from_kept(name, deployments(store).read(name, KeptDeployment), reschedule=reschedule).register(
            client, offered
        )
        for name in names or deployments(store).names()
    ]


def from_kept(name: str, kept: KeptDeployment, *, reschedule: bool = False) -> Deployment:
    """Return the deployment that a store keeps."""
    schedule: Schedule | None = None
    if kept.cron:
        schedule = Cron(kept.cron, timezone=kept.timezone, slug=DEPLOYED)
    elif kept.every_s:
        schedule = Interval(timedelta(seconds=kept.every_s), timezone=kept.timezone, slug=DEPLOYED)
    return Deployment(
        SERVED[kept.flow],
        name,
        Path(kept.folder),
        inputs=kept.inputs,
        schedule=schedule,
        reschedule=reschedule,
        overlap=kept.overlap,
    )


def describe(flow: Flow[..., Any], inputs: Mapping[str, Any]) -> str:
    """What a deployment's page says: what it does, with what, an example."""
    about = (flow.description or "").split("\n\nArgs:")[0]
    given = ", ".join(f"{name}: `{value}`" for name, value in inputs.items())
    form = FORMS.get(flow.name, {})
    examples = {name: how.example for name, how in form.items() if how.example and name not in _DEEPER}
    example = ", ".join(f"{name}: `{value}`" for name, value in list(examples.items())[:3])
    lines = [about, f"With {given}." if given else f"Example: {example}." if example else ""]
    return "\n\n".join(line for line in lines if line)


_DEEPER = {"settings", "store", "keep_as", "configuration"}


async def keep_schedules(
    client: PrefectClient, deployment: RunnerDeployment, *, replace: bool = False
) -> None:
    """Hand a deployment the schedules that the server holds for it.

    Registering a deployment deletes all its schedules, also those made in the UI, and switches it on.

    Args:
        client: The server's client.
        deployment: With the schedule it begins with, which counts for a deployment that is new.
        replace: Put that schedule in the place of the one with its slug, and keep the others.
    """
    try:
        old = await client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        return
    new = list(deployment.schedules or []) if replace else []
    replaced = {schedule.slug for schedule in new}
    kept: list[Any] = [
        DeploymentScheduleCreate(
            schedule=schedule.schedule,
            active=schedule.active,
            parameters=schedule.parameters,
            slug=schedule.slug,
            max_scheduled_runs=schedule.max_scheduled_runs,
        )
        for schedule in old.schedules
        if schedule.slug is None or schedule.slug not in replaced
    ]
    # Of the example schedule the server's version counts; deleted in the UI, it stays deleted.
    deployment.schedules = [*kept, *new]
    deployment.paused = old.paused


async def deploy_all(working_dir: Path, timeout_s: float) -> list[str]:
    """Wait for the server, then register every flow and everything that the store keeps."""
    flows = list(SERVED.values())
    for entry in flows:
        entry.load()  # takes seconds, in which the server may still be starting
    store = Store(default_store())
    offered = choices(store)
    await wait_for_api(timeout_s)
    async with get_client() as client:
        await prepare_pool(client)
        registered = await deploy(client, flows, working_dir, offered)
        return registered + await deploy_kept(client, store, offered)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and register the flows."""
    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description=__doc__)
    parser.add_argument(
        "--working-dir", type=Path, default=Path.cwd(), help="folder that relative paths start from"
    )
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for the server")
    options = parser.parse_args(arguments)
    asyncio.run(deploy_all(options.working_dir, options.timeout))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
