"""The environment variables under which Prefect runs here; to be set before anything imports prefect.

Each value was measured or read in Prefect 3.8.8; the reason stands beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
LOGGED_PACKAGES = ("flows", "pipeline", "features", "recommenders")
"""Loggers whose messages appear beside Prefect's own in the log of a flow run."""


def url_host(host: str) -> str:
    """A host as it stands in a URL; one that listens everywhere is reached at the loopback address."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"[{reachable}]" if ":" in reachable else reachable


def client_environment(home: Path, api_url: str, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every process needs that talks to the API; no API address means an ephemeral server.

    Args:
        home: The state folder; Prefect's profiles and SQLite database go there, not to ``~/.prefect``.
        api_url: Address of the API, or "" for a server that lives inside the process.
        base: The environment to start from; this process's own by default.
    """
    environment = dict(os.environ if base is None else base)
    for name in ("PREFECT_PROFILE", "PREFECT_API_KEY", "PREFECT_API_URL"):
        environment.pop(name, None)  # of another server or of a profile that this home does not hold
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # also avoids "database is locked" at the first start
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(LOGGED_PACKAGES),
        # Threads of loaders and writers log without a run; that is no reason for a warning each time.
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "NO_PROXY": _with_local_hosts(environment.get("NO_PROXY", environment.get("no_proxy", ""))),
    }
    environment["no_proxy"] = environment["NO_PROXY"]
    if api_url:
        environment["PREFECT_API_URL"] = api_url
    return environment


def server_environment(home: Path, host: str, port: int) -> dict[str, str]:
    """What the API server and its UI need on top of the client's part."""
    origin = f"http://{url_host(host)}:{port}"
    origins = [origin, f"http://localhost:{port}"] if host in LOCAL_HOSTS else [origin]
    return client_environment(home, f"{origin}/api") | {
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        # Relative to the page: without it the UI of any other port calls port 4200.
        "PREFECT_UI_API_URL": "/api",
        # By default any web page in the user's browser may start flow runs, which run commands.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # Kept in memory, the slots of killed runs would be lost with a restart of the server.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The default is a folder inside the installed package, which may be read-only or shared.
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
    }


def worker_environment(home: Path, api_url: str, store: str) -> dict[str, str]:
    """What the worker hands on to the flow processes it starts."""
    environment = client_environment(home, api_url)
    environment.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")  # 10 s by default: slow for a click in the UI
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # see `crash_when_silent`
    return environment | {"TANDEM_STORE": store}


def _with_local_hosts(no_proxy: str) -> str:
    hosts = [host for host in no_proxy.split(",") if host]
    return ",".join([*hosts, *(host for host in LOCAL_HOSTS if host not in hosts)])
