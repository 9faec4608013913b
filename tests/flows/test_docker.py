"""The images cannot be built without Docker; what can be checked without it is checked here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import prefect.settings
import pytest
import yaml

from flows.server.environment import server_environment, worker_environment

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def instructions(name: str) -> list[str]:
    """The words of each ``name`` line of the Dockerfile, continuation lines joined."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


def unknown_settings(environment: dict[str, str]) -> list[str]:
    """Those of Prefect's variables that Prefect does not know."""
    unknown = []
    for name in environment:
        if name.startswith("PREFECT_"):
            try:
                getattr(prefect.settings, name)
            except AttributeError:
                unknown.append(name)
    return unknown


def test_what_the_dockerfile_copies_is_there() -> None:
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "features", "recommenders", "pipeline", "flows"} <= set(
        sources
    )
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {source for line in instructions("COPY") for source in line.split()[:-1]} == allowed


def test_each_image_installs_one_build_of_faiss_from_the_pinned_versions() -> None:
    installs = [line for line in instructions("RUN") if "--requirement pyproject.toml" in line]
    assert [re.findall(r"--extra (cpu|gpu)", line) for line in installs] == [["cpu"], ["gpu"]]
    assert all("--constraints constraints.txt" in line for line in installs)


def test_the_images_do_not_run_as_root() -> None:
    assert instructions("USER") == ["tandem", "tandem"]


def test_the_targets_of_the_compose_files_exist() -> None:
    stages = {line.split(" AS ")[1] for line in instructions("FROM")}
    services = [*compose()["services"].values(), *compose("compose.cuda.yaml")["services"].values()]
    builds = [service["build"] for service in services if "build" in service]
    assert {build["target"] for build in builds} == {"cpu", "cuda"} <= stages
    assert all((DOCKER / build["context"] / build["dockerfile"]).exists() for build in builds)


def test_every_port_is_open_to_this_machine_only() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:4200:4200"]


def test_the_server_asks_for_a_login_and_the_worker_has_it() -> None:
    services = compose()["services"]
    assert services["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"].startswith("${TANDEM_LOGIN:?")
    assert services["worker"]["environment"]["PREFECT_API_AUTH_STRING"] == "${TANDEM_LOGIN}"
    assert "${POSTGRES_PASSWORD:?" in services["database"]["environment"]["POSTGRES_PASSWORD"]


def test_the_example_names_each_variable_without_a_password() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    lines = [line for line in (DOCKER / "example.env").read_text().splitlines() if not line.startswith("#")]
    values = dict(line.split("=", 1) for line in lines)
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) == set(values)
    assert values["POSTGRES_PASSWORD"] == values["TANDEM_LOGIN"] == ""


def test_the_modules_that_the_services_start_can_be_started() -> None:
    text = (DOCKER / "compose.yaml").read_text().replace('", "', " ")
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert modules == {"prefect", "flows.deployments", "flows.server.worker"}
    for module in modules:
        assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("service", ["server", "worker"])
def test_prefect_knows_each_variable_of_a_service(service: str) -> None:
    assert unknown_settings(compose()["services"][service]["environment"]) == []


def test_prefect_knows_each_variable_that_the_launcher_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    home = Path("/state")
    assert unknown_settings(server_environment(home, "127.0.0.1", 4200)) == []
    assert unknown_settings(worker_environment(home, "http://127.0.0.1:4200/api", "/shop")) == []


def test_the_composed_server_has_the_launcher_s_hardening() -> None:
    composed = compose()["services"]["server"]["environment"]
    launched = server_environment(Path("/state"), "127.0.0.1", 4200)
    same = [
        "PREFECT_UI_API_URL",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY",
    ]
    assert {name: composed[name] for name in same} == {name: launched[name] for name in same}
