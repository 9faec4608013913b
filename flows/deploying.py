"""``tandem deploy``: a flow with its inputs filled in, kept in the store and registered with its server."""

from __future__ import annotations

import asyncio
import difflib
from typing import Any

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.utilities.asyncutils import run_coro_as_sync

from flows.deployments import SERVED, deploy_kept
from flows.forms import FORMS, choices
from pipeline.errors import ConfigError
from pipeline.kept import KeptConfiguration, KeptDeployment, configurations, deployments
from pipeline.store import Store


def keep(
    store: Store, name: str, deployment: KeptDeployment, configuration: KeptConfiguration | None = None
) -> None:
    """Keep a deployment, and the configuration it reads, under one name.

    Raises:
        ConfigError: A flow has that name.
        StoreError: The name is not allowed.
    """
    if name in SERVED:
        raise ConfigError(f"{name!r} is the name of a flow; choose another, such as 'nightly-{name}'.")
    if configuration is not None:
        configurations(store).write(name, configuration)
    deployments(store).write(name, deployment)


def remove(store: Store, name: str) -> KeptDeployment:
    """Take a deployment and its configuration out of the store.

    Raises:
        ConfigError: There is none of this name.
    """
    kept = deployments(store).read(name, KeptDeployment)
    deployments(store).remove(name)
    configurations(store).remove(name)
    return kept


def register_now(store: Store, name: str, *, reschedule: bool = False) -> None:
    """Register a kept deployment with the server that this process talks to."""

    async def register() -> None:
        async with get_client() as client:
            await deploy_kept(client, store, choices(store), [name], reschedule=reschedule)

    run_coro_as_sync(register())


def unregister_now(flow: str, name: str) -> bool:
    """Delete a deployment from the server that this process talks to; says whether there was one."""

    async def delete() -> bool:
        async with get_client() as client:
            try:
                found = await client.read_deployment_by_name(f"{flow}/{name}")
            except ObjectNotFound:
                return False
            await client.delete_deployment(found.id)
            return True

    return asyncio.run(delete())


def stage_inputs(flow: str, given: dict[str, str]) -> dict[str, str | int | float | bool]:
    """Turn what was typed for a flow's inputs into their values.

    Args:
        flow: Name of a served flow.
        given: Input -> text, as typed behind ``--input``.

    Raises:
        ConfigError: An input is not known, not of its kind, or one that is required is missing.
    """
    if flow not in SERVED:
        near = difflib.get_close_matches(flow, SERVED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SERVED)}."
        raise ConfigError(f"--stage is {flow!r}; {hint}")
    schema = SERVED[flow].load().parameters
    mistakes = [_unknown(flow, name) for name in given if name not in FORMS[flow]]
    mistakes += [
        f"--{name.replace('_', '-')} is missing: {FORMS[flow][name].description}"
        for name in schema.required
        if not given.get(name)
    ]
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name in FORMS[flow]:
            try:
                values[name] = _value(text, schema.properties[name], FORMS[flow][name].choices)
            except ValueError as error:
                mistakes.append(f"--{name.replace('_', '-')} is {text!r}; {error}")
    if mistakes:
        raise ConfigError(f"{flow} cannot be deployed so:\n" + "\n".join(f"  {line}" for line in mistakes))
    return values


def _unknown(flow: str, name: str) -> str:
    known = list(FORMS[flow])
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(f"--{each.replace('_', '-')}" for each in known)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else f"{flow} takes {listed}."
    return f"--{name.replace('_', '-')} is no input of {flow}; {hint}"


def _value(text: str, schema: dict[str, Any], allowed: tuple[str, ...]) -> str | int | float | bool:
    kind = schema.get("type")
    if kind == "boolean":
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError("expected true or false.")
    if kind == "integer":
        try:
            number = int(text)
        except ValueError:
            raise ValueError("expected a whole number.") from None
        if number < schema.get("minimum", number):
            raise ValueError(f"expected at least {schema['minimum']}.")
        return number
    if allowed and text not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}.")
    return text
