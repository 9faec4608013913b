"""``tandem up`` as a user starts it: the real server, the real worker, real runs, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings

from flows.deployments import SERVED
from flows.server.places import state_home
from flows.server.processes import is_alive
from pipeline.datasets.config import DatasetConfig
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Store

pytestmark = [pytest.mark.prefect, pytest.mark.slow, pytest.mark.xdist_group("prefect")]
TANDEM = [sys.executable, "-c", "from flows.cli import main; main()"]
PATIENCE_S = 240.0
SMALL: dict[str, Any] = {
    "name": "corner-shop",
    "dataset": {"demo": {"n_items": 40, "n_users": 60}},
    "feature_sets": [{"image": "random:16", "text": "random:16"}],
    "recommenders": [{"model": "popularity"}, {"model": "itemknn_content"}],
    "seeds": [0],
}
EXTRACT = {"dataset": "toys", "encoder": "random:16", "modality": "image"}


@dataclass
class Up:
    """A running ``tandem up``."""

    process: subprocess.Popen[bytes]
    store: Path
    home: Path
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def words(self) -> str:
        return self.log.read_text()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while "ready:   http" not in self.words():
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < until, self.words()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Up]:
    """One ``tandem up`` for all tests, on a copy of the other server's database: a new one takes 10 s."""
    folder = tmp_path_factory.mktemp("up")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    os.environ["TANDEM_HOME"] = str(folder / "state")
    store, log = folder / "shop", folder / "up.log"
    home = state_home(str(store))
    home.mkdir(parents=True)
    made = PREFECT_API_DATABASE_CONNECTION_URL.value().removeprefix("sqlite+aiosqlite:///")
    with closing(sqlite3.connect(made)) as database, closing(sqlite3.connect(home / "prefect.db")) as copy:
        database.backup(copy)
    command = [*TANDEM, "up", "--store", str(store), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    started = Up(process, store, home, port, log)
    try:
        started.wait_until_ready()
        yield started
    finally:
        os.environ.pop("TANDEM_HOME")
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture
def client(up: Up) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: f"{up.url}/api"}), get_client(sync_client=True) as found:
        yield found


def start(client: SyncPrefectClient, flow: str, parameters: dict[str, Any]) -> UUID:
    """What a click on "Run" does."""
    deployment = client.read_deployment_by_name(f"{flow}/{flow}")
    return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id


def wait(client: SyncPrefectClient, run_id: UUID, states: set[StateType] | None = None) -> FlowRun:
    """Wait for a run to end, or to come into one of the states."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        run = client.read_flow_run(run_id)
        if run.state is not None and (run.state.type in states if states else run.state.is_final()):
            return run
        time.sleep(0.2)
    raise AssertionError(f"{run.name} is {run.state_name} after {PATIENCE_S:.0f} s")


def artifact_keys(client: SyncPrefectClient, run_id: UUID) -> set[str | None]:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    )
    return {artifact.key for artifact in found}


def test_the_flows_are_listed(client: SyncPrefectClient) -> None:
    """It sends a null for the limit: with a FastAPI that is too new the server answers 422."""
    assert {deployment.name for deployment in client.read_deployments()} >= set(SERVED)


def test_a_second_up_says_where_the_first_one_is(up: Up) -> None:
    command = [*TANDEM, "up", "--store", str(up.store), "--port", str(up.port)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert second.returncode == 2
    assert f"A server for this store is up already at {up.url}" in second.stderr


def test_foreign_pages_cannot_start_runs(up: Up) -> None:
    def status(method: str, headers: dict[str, str]) -> int:
        request = urllib.request.Request(  # noqa: S310 - our own server
            f"{up.url}/api/flow_runs/",
            data=b"{}" if method == "POST" else None,
            headers=headers,
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - our own server
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert status("OPTIONS", preflight) == 400
    assert status("POST", {"Content-Type": "application/json"}) == 403


def test_runs_started_in_the_ui_complete_one_gpu_flow_at_a_time(up: Up, client: SyncPrefectClient) -> None:
    store = Store(up.store)
    dataset = prepare_dataset(store, DatasetConfig.model_validate(SMALL["dataset"]))
    store.name("toys", dataset.artefact)
    extract = start(client, "extract-features", EXTRACT)
    two_stage = start(client, "two-stage", {"settings": yaml.safe_dump(SMALL)})
    runs = [wait(client, run_id) for run_id in (extract, two_stage)]
    assert {run.state_name for run in runs} == {"Completed"}
    earlier, later = sorted(runs, key=lambda run: str(run.start_time))
    assert earlier.end_time is not None
    assert later.start_time is not None
    assert later.start_time >= earlier.end_time, "the gpu queue let two flows run at once"
    keys = artifact_keys(client, extract)
    assert {"extract-features-random-16-image", "extract-features-random-16-image-figures"} <= keys
    assert {"two-stage-corner-shop", "two-stage-corner-shop-stages"} <= artifact_keys(client, two_stage)


def test_second_runs_show_that_everything_was_reused(
    up: Up, client: SyncPrefectClient, tmp_path: Path
) -> None:
    """From the UI, and from ``tandem run``, whose run the server shows."""
    extract = start(client, "extract-features", EXTRACT)
    config = tmp_path / "corner-shop.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [*TANDEM, "run", str(config), "--store", str(up.store), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused"] == 6
    again = wait(client, extract)
    assert (again.state_name, again.name, sorted(again.tags)) == (
        "Cached",
        "random-16-image (reused)",
        ["gpu", "reused", "stage"],
    )
    typed = next(run for run in client.read_flow_runs() if run.name == "corner-shop (reused)")
    assert (typed.state_name, typed.deployment_id) == ("Cached", None)


def test_stopping_leaves_no_process_and_tells_what_became_of_the_runs(
    up: Up, client: SyncPrefectClient
) -> None:
    big = {"settings": "demo: {n_items: 20000, n_users: 4000}"}
    run_id = start(client, "prepare-dataset", big)
    wait(client, run_id, {StateType.RUNNING})
    everything = psutil.Process(up.process.pid).children(recursive=True)
    assert len(everything) >= 3, "server, worker, flow"
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0, up.words()
    assert [process for process in everything if is_alive(process)] == []
    assert up.words().rstrip().endswith("stopped")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", up.port))
    with closing(sqlite3.connect(up.home / "prefect.db")) as database:
        query = "select state_type from flow_run where replace(id, '-', '') = ?"
        assert database.execute(query, (run_id.hex,)).fetchone() == ("CRASHED",)
    assert not (up.home / "server.json").exists()
