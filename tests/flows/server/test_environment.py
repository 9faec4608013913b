from __future__ import annotations

from pathlib import Path

import pytest

from flows.server.environment import client_environment, server_environment, url_host, worker_environment

HOME = Path("/state/shop")


def test_the_ui_calls_its_own_server_and_foreign_pages_may_not() -> None:
    environment = server_environment(HOME, "127.0.0.1", 4242)
    assert environment["PREFECT_UI_API_URL"] == "/api"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4242/api"
    assert environment["PREFECT_SERVER_API_PORT"] == "4242"
    assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    origins = environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:4242", "http://localhost:4242"]


def test_nothing_is_reported_to_anybody() -> None:
    environment = server_environment(HOME, "127.0.0.1", 4242)
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["DO_NOT_TRACK"] == "1"


def test_a_server_that_listens_everywhere_is_reached_at_the_loopback_address() -> None:
    assert url_host("0.0.0.0") == "127.0.0.1"  # noqa: S104 - not bound
    assert url_host("::") == "[::1]"
    assert url_host("shop.example") == "shop.example"


def test_profiles_and_keys_of_other_servers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_PROFILE", "PREFECT_API_KEY", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "another")
    environment = client_environment(HOME, "")
    assert not {"PREFECT_PROFILE", "PREFECT_API_KEY", "PREFECT_API_URL"} & set(environment)
    assert environment["PREFECT_HOME"] == str(HOME)


def test_a_chosen_database_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+asyncpg://user:pw@db/prefect"
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    assert server_environment(HOME, "127.0.0.1", 4200)["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == url


def test_a_proxy_is_not_asked_for_the_own_machine() -> None:
    environment = client_environment(HOME, "", {"no_proxy": "intranet,localhost"})
    assert environment["NO_PROXY"] == environment["no_proxy"] == "intranet,localhost,127.0.0.1,::1"


def test_flow_processes_learn_the_store_and_may_be_polled_at_another_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = worker_environment(HOME, "http://127.0.0.1:4200/api", "/shop")
    assert environment["TANDEM_STORE"] == "/shop"
    assert environment["PREFECT_WORKER_QUERY_SECONDS"] == "2"
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "9")
    assert worker_environment(HOME, "", "/shop")["PREFECT_WORKER_QUERY_SECONDS"] == "9"
