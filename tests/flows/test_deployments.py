from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import get_current_settings

from flows import deployments
from flows.deployments import NIGHTLY, SERVED, Served, deploy
from flows.forms import FORMS, Choices, form_schema
from flows.reporting import NextStep, deployment_id
from flows.server.pool import CPU, GPU, prepare_pool

T = TypeVar("T")
with_server = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
]
OFFERED = Choices({"dataset": ("shop",), "features": ("looks",), "encoders": ("tiny", "clip")})
TOY = Served("tests.flows.dummy", "toy_flow", CPU, ("stage",), NIGHTLY)


def schemas(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every schema inside a schema."""
    if isinstance(value, dict):
        if "type" in value or "$ref" in value or "anyOf" in value:
            yield value
        for name, inner in value.items():
            if name not in {"default", "examples", "enum"}:
                yield from schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from schemas(inner)


@pytest.mark.parametrize("name", SERVED)
def test_each_flow_is_named_as_it_is_served(name: str) -> None:
    assert SERVED[name].load().name == name


@pytest.mark.parametrize("name", SERVED)
def test_the_form_explains_each_argument_of_a_flow(name: str) -> None:
    schema = form_schema(SERVED[name].load(), OFFERED)
    for argument, field in schema["properties"].items():
        assert field["description"], argument
        assert field["title"] != argument, "a title in words"


@pytest.mark.parametrize("name", SERVED)
def test_a_form_has_exactly_the_inputs_of_its_flow_and_not_too_many(name: str) -> None:
    taken = SERVED[name].load().parameters.properties
    assert set(FORMS[name]) == set(taken)
    assert len(taken) <= (12 if name in ("two-stage", "paradigms") else 10)


@pytest.mark.parametrize("name", SERVED)
def test_inputs_are_text_numbers_switches_and_choices(name: str) -> None:
    """The page's dialogs lose lists and nested objects."""
    schema = form_schema(SERVED[name].load(), OFFERED)
    assert "definitions" not in schema
    kinds = {found["type"] for found in schemas(schema) if "type" in found} - {"object"}
    assert kinds <= {"string", "integer", "number", "boolean"}
    assert [found for found in schemas(schema) if found.get("type") == "object"] == [schema]


@pytest.mark.parametrize("name", SERVED)
def test_settings_is_the_only_place_for_what_is_deeper(name: str) -> None:
    assert SERVED[name].load().parameters.properties["settings"]["default"] == ""


@pytest.mark.parametrize("name", SERVED)
def test_no_setting_may_be_null_because_the_form_stores_null_for_it(name: str) -> None:
    schema = form_schema(SERVED[name].load(), OFFERED)
    assert not [found for found in schemas(schema) if found.get("type") == "null"]


@pytest.mark.parametrize("name", SERVED)
def test_only_references_to_artefacts_have_no_default(name: str) -> None:
    required = SERVED[name].load().parameters.model_dump()["required"]
    assert set(required) <= {"dataset", "source", "runs"}


def test_stages_that_use_the_accelerator_wait_in_one_queue() -> None:
    queues = {name: entry.queue for name, entry in SERVED.items()}
    assert queues["prepare-dataset"] == queues["compare-features"] == CPU
    assert {queues[name] for name in ("extract-features", "train-recommender", "two-stage")} == {GPU}
    assert GPU.limit == 1


def test_the_example_schedule_is_off() -> None:
    schedules = [entry.schedule for entry in SERVED.values() if entry.schedule]
    assert [schedule.active for schedule in schedules] == [False]


class TestWithServer:
    """What registering does to a server; the flow is a dummy."""

    pytestmark = with_server

    @staticmethod
    def run(work: Callable[[PrefectClient], Awaitable[T]]) -> T:
        async def with_client() -> T:
            async with get_client() as client:
                await prepare_pool(client)
                return await work(client)

        return asyncio.run(with_client())

    @staticmethod
    async def registered(client: PrefectClient, folder: Path) -> DeploymentResponse:
        assert await deploy(client, [TOY], folder) == ["toy/toy"]
        return await client.read_deployment_by_name("toy/toy")

    def test_a_flow_is_registered_with_its_queue_folder_and_form(self, tmp_path: Path) -> None:
        async def work(client: PrefectClient) -> DeploymentResponse:
            return await self.registered(client, tmp_path)

        found = self.run(work)
        assert (found.work_pool_name, found.work_queue_name, found.tags) == ("tandem", "cpu", ["stage"])
        assert found.entrypoint == "tests.flows.dummy.toy_flow"
        assert found.job_variables == {"working_dir": str(tmp_path), "command": "python -m prefect.engine"}
        assert found.description == "Keep a colour."
        assert set(found.parameter_openapi_schema["properties"]) == {"colour", "store", "name"}

    def test_the_command_waits_for_the_server_and_registers_every_flow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(deployments, "SERVED", {"toy": TOY})
        monkeypatch.setenv("PREFECT_API_URL", str(get_current_settings().api.url))
        assert deployments.main(["--working-dir", str(tmp_path), "--timeout", "30"]) == 0

        async def work(client: PrefectClient) -> DeploymentResponse:
            return await client.read_deployment_by_name("toy/toy")

        assert self.run(work).job_variables["working_dir"] == str(tmp_path)

    def test_a_result_links_to_the_form_of_a_served_flow(self, tmp_path: Path) -> None:
        async def work(client: PrefectClient) -> DeploymentResponse:
            return await self.registered(client, tmp_path)

        found = self.run(work)
        deployment_id.cache_clear()  # it may have been asked before the flow was served
        url = NextStep("Again", "toy", {"colour": "red"}).url()
        assert url.startswith("http://127.0.0.1:")
        assert f"/v2/deployments/deployment/{found.id}/run?parameters=" in url
        assert NextStep("Again", "nothing", {}).url() == ""

    def test_schedules_made_in_the_ui_and_the_switch_outlive_the_next_start(self, tmp_path: Path) -> None:
        async def work(client: PrefectClient) -> DeploymentResponse:
            found = await self.registered(client, tmp_path)
            assert [schedule.slug for schedule in found.schedules] == ["nightly"]
            weekly = DeploymentScheduleCreate(
                schedule=CronSchedule(cron="0 5 * * 1"), active=True, parameters={"colour": "red"}
            )
            await client.create_deployment_schedules(found.id, [weekly])
            await client.update_deployment(found.id, DeploymentUpdate(paused=True))
            return await self.registered(client, tmp_path)

        found = self.run(work)
        kept = {getattr(schedule.schedule, "cron", ""): schedule for schedule in found.schedules}
        assert set(kept) == {"0 3 * * *", "0 5 * * 1"}
        assert kept["0 5 * * 1"].parameters == {"colour": "red"}
        assert kept["0 5 * * 1"].active
        assert found.paused

    def test_an_example_schedule_that_was_deleted_stays_deleted(self, tmp_path: Path) -> None:
        async def work(client: PrefectClient) -> DeploymentResponse:
            found = await self.registered(client, tmp_path)
            for schedule in found.schedules:
                await client.delete_deployment_schedule(found.id, schedule.id)
            return await self.registered(client, tmp_path)

        assert self.run(work).schedules == []
