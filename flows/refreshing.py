"""Forms offer what the store holds: refreshed when the server starts and after every run."""

from __future__ import annotations

import logging
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

from flows.deployments import SERVED
from flows.forms import FORMS, Choices, choices, with_offers
from flows.server.pool import POOL
from pipeline.store import Store

log = logging.getLogger(__name__)
ENTRYPOINTS = {f"{served.module}.{served.function}": name for name, served in SERVED.items()}


def refresh_forms(client: SyncPrefectClient, offered: Choices) -> int:
    """Put what can be chosen now into the forms of all deployments; returns how many were changed.

    Only a form whose choices are others is written: a write takes the runs away that the server has made
    ahead from the deployment's schedules, until it makes them again.
    """
    changed = 0
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for deployment in client.read_deployments(work_pool_filter=pool):
        form = FORMS.get(ENTRYPOINTS.get(deployment.entrypoint or "", ""), {})
        schema = deployment.parameter_openapi_schema or {}
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        for name, how in form.items():
            if how.offers and name in properties:
                properties[name] = with_offers(properties[name], how, offered)
        if properties != schema.get("properties", {}):
            update = DeploymentUpdate(parameter_openapi_schema={**schema, "properties": properties})
            client.update_deployment(deployment.id, update)
            changed += 1
    return changed


def refresh_after_run(store: Store) -> None:
    """Refresh the forms; a server that does not take them does not end a run that is done."""
    try:
        with get_client(sync_client=True) as client:
            refresh_forms(client, choices(store))
    except Exception as error:  # noqa: BLE001 - whatever it is, the run's work is done
        log.warning("The forms' choices could not be refreshed: %s", error)
