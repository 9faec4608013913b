from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Running

from flows.server.pool import POOL, crash_orphans, crash_when_silent, other_workers, prepare_pool

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
]
T = TypeVar("T")


def with_client(work: Callable[[PrefectClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with get_client() as client:
            await prepare_pool(client)
            return await work(client)

    return asyncio.run(run())


@flow(name="left over")
def left_over() -> None:
    """Never run: only its runs are made."""


@task
def left_over_task() -> None:
    """Stands for a subflow in its parent."""


async def make_run(client: PrefectClient, name: str, *, pool: bool, parent: UUID | None = None) -> UUID:
    """A run in state Running that no process works on."""
    caller = await client.create_task_run(left_over_task, parent, dynamic_key=name) if parent else None
    run = await client.create_flow_run(
        left_over,
        name=name,
        state=Running(),
        work_pool_name=POOL if pool else None,
        parent_task_run_id=caller.id if caller else None,
    )
    return run.id


def test_one_gpu_flow_at_a_time_and_light_ones_beside_it() -> None:
    async def limits(client: PrefectClient) -> dict[str, int | None]:
        queues = await client.read_work_queues(work_pool_name=POOL)
        return {queue.name: queue.concurrency_limit for queue in queues}

    found = with_client(limits)
    assert found["gpu"] == 1
    assert found["cpu"] is None


def test_a_limit_changed_in_the_ui_outlives_the_next_start() -> None:
    async def change_and_prepare(client: PrefectClient) -> int | None:
        queue = await client.read_work_queue_by_name("gpu", work_pool_name=POOL)
        await client.update_work_queue(queue.id, concurrency_limit=2)
        await prepare_pool(client)
        changed = await client.read_work_queue_by_name("gpu", work_pool_name=POOL)
        await client.update_work_queue(queue.id, concurrency_limit=1)
        return changed.concurrency_limit

    assert with_client(change_and_prepare) == 2


def test_runs_without_a_process_and_their_subflows_are_marked_as_crashed() -> None:
    async def run(client: PrefectClient) -> dict[str, StateType]:
        orphan = await make_run(client, "orphan", pool=True)
        subflow = await make_run(client, "subflow", pool=False, parent=orphan)
        elsewhere = await make_run(client, "elsewhere", pool=False)
        done = await make_run(client, "done", pool=True)
        await client.set_flow_run_state(done, Completed(), force=True)
        assert sorted(await crash_orphans(client, "gone")) == ["orphan", "subflow"]
        assert await crash_orphans(client, "gone") == []
        states = {}
        for run_id in (orphan, subflow, elsewhere, done):
            found = await client.read_flow_run(run_id)
            assert found.state is not None
            states[found.name] = found.state.type
        await client.set_flow_run_state(elsewhere, Completed(), force=True)
        return states

    assert with_client(run) == {
        "orphan": StateType.CRASHED,
        "subflow": StateType.CRASHED,
        "elsewhere": StateType.RUNNING,
        "done": StateType.COMPLETED,
    }


def test_a_worker_knows_of_others_that_are_alive() -> None:
    async def run(client: PrefectClient) -> list[str]:
        await client.send_worker_heartbeat(POOL, "here", heartbeat_interval_seconds=30)
        await client.send_worker_heartbeat(POOL, "there", heartbeat_interval_seconds=30)
        return await other_workers(client, "here")

    assert with_client(run) == ["there"]


def test_the_heartbeat_automation_is_made_once_and_stays_switched_off() -> None:
    async def run(client: PrefectClient) -> list[bool]:
        await crash_when_silent(client)
        (made,) = await client.read_automations_by_name("Tandem: crash runs without a heartbeat")
        await client.pause_automation(made.id)
        await crash_when_silent(client)
        found = await client.read_automations_by_name("Tandem: crash runs without a heartbeat")
        return [automation.enabled for automation in found]

    assert with_client(run) == [False]
