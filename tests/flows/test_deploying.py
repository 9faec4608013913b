"""``tandem deploy``: what is kept, what the server gets, and what is refused before either."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.utilities.asyncutils import run_coro_as_sync

from flows import running
from flows.cli import app
from flows.deploying import keep, register_now, remove, stage_inputs, unregister_now
from flows.deployments import deploy
from flows.forms import Choices, choices
from flows.refreshing import refresh_forms
from flows.server.pool import prepare_pool
from flows.tasks import value_of
from flows.two_stage import two_stage_flow
from pipeline.console import run_app
from pipeline.errors import ConfigError
from pipeline.kept import KeptConfiguration, KeptDeployment, configurations, deployments
from pipeline.store import Store

SHOP = "dataset: {demo: {n_items: 40, n_users: 60}}\nseeds: [0]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a person types; no server is up for the store in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(running, "running_server", lambda store: "")
    (tmp_path / "shop.yaml").write_text(SHOP)
    return tmp_path


def typed(*words: str) -> int:
    return run_app(app, ["deploy", *words, "--store", "store"])


def test_a_file_is_kept_with_its_deployment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shop.yaml").write_text(SHOP + "extraction: {dtype: float32}\n")
    assert typed("shop.yaml", "--name", "nightly", "--cron", "0 3 * * *", "--timezone", "Europe/Paris") == 0
    assert "comes to the page when `tandem up` is started" in capsys.readouterr().out
    store = Store("store")
    kept = deployments(store).read("nightly", KeptDeployment)
    assert (kept.flow, kept.inputs) == ("two-stage", {"configuration": "nightly"})
    assert (kept.cron, kept.timezone, kept.folder) == ("0 3 * * *", "Europe/Paris", str(folder))
    text = configurations(store).read("nightly", KeptConfiguration).text
    assert "name: nightly" in text
    assert "dtype: float32" in text


def test_a_study_of_paradigms_is_told_by_its_keys(folder: Path) -> None:
    (folder / "study.yaml").write_text("encoders: [tiny]\n")
    assert typed("study.yaml", "--name", "weekly") == 0
    assert deployments(Store("store")).read("weekly", KeptDeployment).flow == "paradigms"


def test_a_stage_is_kept_with_its_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--stage", "extract-features", "--dataset", "shop", "--encoder=clip", "--retry-failed", "yes"]
    assert typed(*words, "--name", "shop-clip", "--every", "6h", "--overlap", "skip", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["deployment"] == "extract-features/shop-clip"
    kept = deployments(Store("store")).read("shop-clip", KeptDeployment)
    assert kept.inputs == {"dataset": "shop", "encoder": "clip", "retry_failed": True, "name": "shop-clip"}
    assert (kept.every_s, kept.overlap) == (21600, "skip")
    assert typed("--list") == 0
    assert "every 21600 s" in capsys.readouterr().out
    assert typed("--remove", "shop-clip") == 0
    assert deployments(Store("store")).names() == []
    assert typed("--remove", "shop-clip") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shop.yaml"], "--name is missing"),
        (["--name", "x"], "Give either a YAML file"),
        (["shop.yaml", "--stage", "two-stage", "--name", "x"], "Give either a YAML file"),
        (["a.yaml", "b.yaml", "--name", "x"], "One file at a time; got a.yaml, b.yaml"),
        (["nothing.yaml", "--name", "x"], "no configuration file nothing.yaml"),
        (["shop.yaml", "--set", "seedz=1", "--name", "x"], "seedz: unknown key; did you mean 'seeds'?"),
        (["shop.yaml", "--name", "x", "--dataset", "shop"], "--dataset: no such option with a file"),
        (["shop.yaml", "--name", "two-stage"], "is the name of a flow"),
        (["shop.yaml", "--name", "A/B"], "cannot be named 'A/B'"),
        (["shop.yaml", "--name", "x", "--cron", "0 3 * *"], "--cron is '0 3 * *'"),
        (["shop.yaml", "--name", "x", "--every", "soon"], "--every is 'soon'; expected at least 10s"),
        (["shop.yaml", "--name", "x", "--every", "1s"], "--every is '1s'; expected at least 10s"),
        (["shop.yaml", "--name", "x", "--every", "1h", "--cron", "0 3 * * *"], "are both given"),
        (["shop.yaml", "--name", "x", "--timezone", "Paris"], "--timezone is 'Paris'"),
        (["--stage", "extract", "--name", "x"], "--stage is 'extract'; did you mean 'extract-features'?"),
        (["--stage", "build-index", "--source", "--name", "x"], "--source has no value"),
        (["--stage", "build-index", "--set", "kind=flat", "--name", "x"], "--set changes a file"),
    ],
)
def test_mistakes_are_told_and_nothing_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert typed(*words) == 2
    assert message in capsys.readouterr().err
    assert deployments(Store("store")).names() == configurations(Store("store")).names() == []


def test_all_mistakes_in_a_stage_s_inputs_are_told_at_once() -> None:
    given = {"datset": "shop", "modality": "sound", "force": "maybe"}
    with pytest.raises(ConfigError) as caught:
        stage_inputs("extract-features", given)
    lines = str(caught.value).splitlines()
    assert lines[0] == "extract-features cannot be deployed so:"
    assert lines[1].strip() == "--datset is no input of extract-features; did you mean --dataset?"
    assert lines[2].strip().startswith("--dataset is missing: Name or reference of a dataset")
    assert lines[3].strip() == "--modality is 'sound'; expected one of image, text, fused."
    assert lines[4].strip() == "--force is 'maybe'; expected true or false."
    with pytest.raises(ConfigError, match=r"--seed is 'x'; expected a whole number"):
        stage_inputs("train-recommender", {"dataset": "shop", "seed": "x"})
    with pytest.raises(ConfigError, match=r"--seeds is '-1'; expected at least 0"):
        stage_inputs("two-stage", {"seeds": "-1"})


@pytest.mark.prefect
@pytest.mark.xdist_group("prefect")
@pytest.mark.usefixtures("prefect_server")
class TestWithServer:
    """What registering does to a server."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        async def prepare() -> None:
            async with get_client() as client:
                await prepare_pool(client)

        run_coro_as_sync(prepare())
        return Store(tmp_path / "shop")

    @staticmethod
    def found(full_name: str) -> DeploymentResponse:
        with get_client(sync_client=True) as client:
            return client.read_deployment_by_name(full_name)

    def kept(self, store: Store, name: str, **changes: Any) -> KeptDeployment:
        kept = KeptDeployment(flow="two-stage", inputs={"configuration": name}, folder=str(Path.cwd()))
        kept = kept.model_copy(update=changes)
        keep(store, name, kept, KeptConfiguration(study="two-stage", text=SHOP))
        return kept

    def test_all_inputs_are_filled_in_and_scalar(self, store: Store) -> None:
        self.kept(store, "filled-in", overlap="skip")
        register_now(store, "filled-in")
        found = self.found("two-stage/filled-in")
        assert set(found.parameters) == set(found.parameter_openapi_schema["properties"])
        assert found.parameters["configuration"] == "filled-in"
        assert all(isinstance(value, str | int | bool) for value in found.parameters.values())
        assert "overlap:skip" in found.tags
        assert "configuration: `filled-in`" in str(found.description)
        assert unregister_now("two-stage", "filled-in")
        assert not unregister_now("two-stage", "filled-in")

    def test_deploying_anew_keeps_schedules_and_the_switch_and_replaces_its_own(self, store: Store) -> None:
        self.kept(store, "scheduled", cron="0 3 * * *")
        register_now(store, "scheduled")
        found = self.found("two-stage/scheduled")
        assert [schedule.slug for schedule in found.schedules] == ["deployed"]
        with get_client(sync_client=True) as client:
            hourly = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(hours=1)))
            client.create_deployment_schedules(found.id, [hourly])
            client.update_deployment(found.id, DeploymentUpdate(paused=True))
        self.kept(store, "scheduled", cron="0 4 * * *")
        register_now(store, "scheduled")  # as at the next start: the server's schedules count
        again = self.found("two-stage/scheduled")
        assert again.paused
        assert [s.schedule.cron for s in again.schedules if isinstance(s.schedule, CronSchedule)] == [
            "0 3 * * *"
        ]
        register_now(store, "scheduled", reschedule=True)  # as `tandem deploy --cron` does
        crons = [s.schedule for s in self.found("two-stage/scheduled").schedules]
        assert [one.cron for one in crons if isinstance(one, CronSchedule)] == ["0 4 * * *"]
        assert len(crons) == 2

    def test_forms_are_refreshed_only_where_choices_are_others(self, store: Store) -> None:
        self.kept(store, "refreshed")
        register_now(store, "refreshed")

        async def served() -> None:
            from flows.deployments import SERVED

            async with get_client() as client:
                await deploy(client, [SERVED["extract-features"]], Path.cwd(), choices(store))

        run_coro_as_sync(served())
        more = Choices({**choices(store).lists, "dataset": ("toys",)})
        with get_client(sync_client=True) as client:
            refresh_forms(client, choices(store))
            assert refresh_forms(client, choices(store)) == 0
            assert refresh_forms(client, more) >= 1
            assert refresh_forms(client, more) == 0
        shown = self.found("extract-features/extract-features").parameter_openapi_schema["properties"]
        assert shown["dataset"]["anyOf"][0]["enum"] == ["toys"]

    def test_a_filled_in_form_is_kept_as_a_deployment_and_runs_again_from_it(self, store: Store) -> None:
        given = {"recommenders": "popularity", "settings": SHOP + "feature_sets: [{text: 'random:8'}]"}
        first = two_stage_flow(**given, keep_as="kept-form", store=store.url, return_state=True)
        assert first.is_completed(), first.message
        found = self.found("two-stage/kept-form")
        assert found.parameters["configuration"] == "kept-form"
        again = two_stage_flow(configuration="kept-form", store=store.url, return_state=True)
        assert again.name == "Cached"
        made, found_again = value_of(first).comparison, value_of(again).comparison
        assert made is not None
        assert found_again is not None
        assert made.artefact.key == found_again.artefact.key
        assert remove(store, "kept-form").flow == "two-stage"
