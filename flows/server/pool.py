"""The work pool, its queues, and what is done for runs whose process is gone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.automations import (
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

POOL = "tandem"
HEARTBEAT_LIMIT = timedelta(minutes=5)
"""Ten missed heartbeats. A run that is merely deep in one long library call must not be taken for dead."""
UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@dataclass(frozen=True)
class Queue:
    """A line in which runs wait; at most ``limit`` of them run at once (None: as many as come)."""

    name: str
    limit: int | None
    description: str


GPU = Queue("gpu", 1, "Stages that use the accelerator, or all cores where there is none: one at a time.")
CPU = Queue("cpu", None, "Light stages; they run beside those of the gpu queue.")
QUEUES = (GPU, CPU)


async def prepare_pool(client: PrefectClient) -> None:
    """Make the work pool and its queues where they are missing; what was changed in the UI stays."""
    try:
        await client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(
            name=POOL, type="process", description="Processes on this machine.", base_job_template=template
        )
        with suppress(ObjectAlreadyExists):  # another process was faster
            await client.create_work_pool(pool)
    for queue in QUEUES:
        try:
            await client.read_work_queue_by_name(queue.name, work_pool_name=POOL)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                await client.create_work_queue(
                    name=queue.name,
                    description=queue.description,
                    concurrency_limit=queue.limit,
                    work_pool_name=POOL,
                )


async def crash_orphans(client: PrefectClient, message: str) -> list[str]:
    """Mark the runs of the pool that nobody works on any more, and their subflows, as crashed.

    A run that was left ``Running`` by a killed worker holds its place in the queue for ever. To be called
    while no worker of the pool runs flows.

    Returns:
        The names of the runs that were marked.
    """
    unfinished = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    orphans = await client.read_flow_runs(flow_run_filter=unfinished, work_pool_filter=pool)
    marked = list(orphans)
    while orphans:
        orphans = await _unfinished_subflows(client, [run.id for run in orphans])
        marked += orphans
    for run in marked:
        await client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return [run.name for run in marked]


async def _unfinished_subflows(client: PrefectClient, parents: Sequence[UUID]) -> list[FlowRun]:
    below = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)),
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=list(parents)),
    )
    return await client.read_flow_runs(flow_run_filter=below)


async def other_workers(client: PrefectClient, own_name: str) -> list[str]:
    """The names of the pool's other workers that gave a sign of life in the last 90 seconds."""
    recent = datetime.now(UTC) - timedelta(seconds=90)
    workers = await client.read_workers_for_work_pool(POOL)
    return [
        worker.name
        for worker in workers
        if worker.name != own_name and worker.last_heartbeat_time and worker.last_heartbeat_time > recent
    ]


async def crash_when_silent(client: PrefectClient) -> None:
    """Have the server mark a run as crashed once its process sends no heartbeat any more.

    It covers a worker that was killed together with its flow processes, or a machine that went down, while
    the server lives on. Made once; switched off or changed in the UI, it stays so.
    """
    name = "Tandem: crash runs without a heartbeat"
    if await client.read_automations_by_name(name):
        return
    minutes = int(HEARTBEAT_LIMIT.total_seconds() // 60)
    await client.create_automation(
        AutomationCore(
            name=name,
            description=f"After {minutes} silent minutes a run gives its place in the queue back.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=HEARTBEAT_LIMIT,
            ),
            actions=[
                ChangeFlowRunState(state=StateType.CRASHED, message=f"No heartbeat for {minutes} minutes.")
            ],
        )
    )
