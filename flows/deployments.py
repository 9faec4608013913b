"""What is served: a deployment per flow and of its name; ``python -m flows.deployments`` registers them."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType

from flows.server.pool import CPU, GPU, POOL, Queue, prepare_pool
from flows.server.worker import wait_for_api

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


async def deploy(client: PrefectClient, served: Sequence[Served], working_dir: Path) -> list[str]:
    """Register flows with the server; schedules and the on/off switch set in the UI are kept.

    Args:
        client: The server's client.
        served: The flows.
        working_dir: The folder that relative paths in a flow's parameters start from.

    Returns:
        The full names, ``flow/deployment``.
    """
    names = []
    for entry in served:
        flow = entry.load()
        deployment = await flow.ato_deployment(
            flow.name,  # the list in the UI shows it in large letters, before the flow's own name
            description=(flow.description or "").split("\n\nArgs:")[0],  # the form shows the arguments
            work_pool_name=POOL,
            work_queue_name=entry.queue.name,
            tags=list(entry.tags),
            schedules=[entry.schedule] if entry.schedule else [],
            job_variables={"working_dir": str(working_dir.resolve()), "command": ENGINE},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        await keep_schedules(client, deployment)
        await deployment.aapply()
        names.append(deployment.full_name)
    return names


async def keep_schedules(client: PrefectClient, deployment: RunnerDeployment) -> None:
    """Hand a deployment the schedules that the server holds for it.

    Registering a deployment deletes all its schedules, also those made in the UI, and switches it on.
    """
    try:
        old = await client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        return
    kept: list[Any] = [
        DeploymentScheduleCreate(
            schedule=schedule.schedule,
            active=schedule.active,
            parameters=schedule.parameters,
            slug=schedule.slug,
            max_scheduled_runs=schedule.max_scheduled_runs,
        )
        for schedule in old.schedules
    ]
    # Of the example schedule the server's version counts; deleted in the UI, it stays deleted.
    deployment.schedules = kept
    deployment.paused = old.paused


async def deploy_all(working_dir: Path, timeout_s: float) -> list[str]:
    """Wait for the server, then register every flow."""
    flows = list(SERVED.values())
    for entry in flows:
        entry.load()  # takes seconds, in which the server may still be starting
    await wait_for_api(timeout_s)
    async with get_client() as client:
        await prepare_pool(client)
        return await deploy(client, flows, working_dir)


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
