"""``tandem deploy``: a configuration or a filled-in stage as something to schedule on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli import app
from pipeline.console import DEFAULT_STORE, JsonOption, Output, SetOption, StoreOption, open_store, table
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.kept import KeptConfiguration, KeptDeployment, Study
    from pipeline.store import Store

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command(rich_help_panel="The whole pipeline", context_settings={"ignore_unknown_options": True})
def deploy(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [--INPUT VALUE]...",
            help="YAML file of a run, or of a study of paradigms; or the inputs of --stage.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What it is called on the page and in the store.")] = "",
    stage: Annotated[
        str, typer.Option(help="Instead of a file: a flow, whose inputs are given as --dataset shop.")
    ] = "",
    cron: Annotated[
        str, typer.Option(help='When it runs: minute, hour, day, month, day of the week, as "0 3 * * *".')
    ] = "",
    every: Annotated[str, typer.Option(help="Or from run to run: 30s, 15m, 6h, 1d.")] = "",
    timezone: Annotated[str, typer.Option(help="Of --cron, such as Europe/Paris.")] = "UTC",
    overlap: Annotated[
        Literal["wait", "skip"],
        typer.Option(help="What a scheduled run does while the one before it still runs."),
    ] = "wait",
    list_: Annotated[bool, typer.Option("--list", help="Show what is deployed.")] = False,
    remove: Annotated[str, typer.Option(help="Take the deployment of this name away.")] = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Keep a configuration, or a stage with its inputs, in the store and put it on the page, to be scheduled.

    It is registered with the server of `tandem up`, now if that is up, else when it starts. Deploying anew
    updates it and keeps the schedules made on the page, and its switch.

    Examples: `tandem deploy shop.yaml --name nightly-shop --cron "0 3 * * *" --timezone Europe/Paris` ·
    `tandem deploy --stage extract-features --dataset shop --encoder clip --name shop-clip --every 6h` ·
    `tandem deploy --list` · `tandem deploy --remove nightly-shop`
    """
    out = Output(as_json=json)
    opened = open_store(store, out)
    config, inputs = _words(words or [])
    if list_:
        _list(out, opened)
    elif remove:
        _remove(out, opened, remove)
    else:
        from flows.running import choose_running_server

        server = choose_running_server(opened.url)  # before anything imports prefect
        every_s = _seconds(every)
        _check_when(cron, every_s, timezone)
        if not name:
            raise ConfigError("--name is missing: what the deployment is called, such as nightly-shop.")
        when = {"cron": cron, "every_s": every_s, "timezone": timezone, "overlap": overlap}
        kept, configuration = _wanted(config, stage, inputs, set_ or [], name, when)
        _deploy(out, opened, name, kept, configuration, server)


def _words(words: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Read a file's path, and ``--input value`` or ``--input=value``.

    Raises:
        ConfigError: There are two files, or an input has no value.
    """
    files: list[str] = []
    inputs: dict[str, str] = {}
    left = iter(words)
    for word in left:
        if not word.startswith("--"):
            files.append(word)
            continue
        option, equals, value = word.partition("=")
        if not equals:
            value = next(left, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{option} has no value; an input is given as --dataset shop.")
        inputs[option.removeprefix("--").replace("-", "_")] = value
    if len(files) > 1:
        raise ConfigError(f"One file at a time; got {', '.join(files)}. An input is given as --dataset shop.")
    return (Path(files[0]) if files else None), inputs


def _seconds(every: str) -> float:
    """Read 30s, 15m, 6h or 1d.

    Raises:
        ConfigError: It is something else, or shorter than ten seconds.
    """
    if not every:
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", every.strip())
    seconds = float(found.group(1)) * UNITS[found.group(2)] if found else 0.0
    if seconds < 10:
        raise ConfigError(f"--every is {every!r}; expected at least 10s, such as 30s, 15m, 6h or 1d.")
    return seconds


def _check_when(cron: str, every_s: float, timezone: str) -> None:
    """Refuse a schedule that could never run.

    Raises:
        ConfigError: Both kinds are given, or one cannot be read.
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if cron and every_s:
        raise ConfigError("--cron and --every are both given; a deployment begins with one schedule.")
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ConfigError(f"--timezone is {timezone!r}; expected a name such as Europe/Paris.") from error
    if cron:
        from prefect.client.schemas.schedules import CronSchedule

        try:
            CronSchedule(cron=cron, timezone=timezone)
        except ValueError as error:
            raise ConfigError(
                f"--cron is {cron!r}; expected minute, hour, day, month and day of the week, such as "
                '"0 3 * * *" for every night at three.'
            ) from error


def _wanted(
    config: Path | None,
    stage: str,
    inputs: dict[str, str],
    overrides: list[str],
    name: str,
    when: dict[str, Any],
) -> tuple[KeptDeployment, KeptConfiguration | None]:
    """Check what is to be deployed, all of it, before anything is kept.

    Raises:
        ConfigError: Neither or both of a file and a stage, or something in them is not right.
    """
    from pipeline.kept import KeptDeployment

    folder = str(Path.cwd())
    if (config is None) == (not stage):
        raise ConfigError(
            "Give either a YAML file, as `tandem deploy shop.yaml --name nightly-shop`, or a stage, as "
            "`tandem deploy --stage extract-features --dataset shop --name shop-clip`."
        )
    if config is None:
        if overrides:
            raise ConfigError('--set changes a file; a stage takes --settings "training: {epochs: 20}".')
        from flows.deploying import stage_inputs

        given = stage_inputs(stage, {"name": name, **inputs})
        return KeptDeployment(flow=stage, inputs=given, folder=folder, **when), None
    if inputs:
        listed = ", ".join(f"--{each.replace('_', '-')}" for each in inputs)
        raise ConfigError(f"{listed}: no such option with a file; change the file, or use --set key=value.")
    study, text = _study(config, overrides, name, folder)
    from pipeline.kept import KeptConfiguration

    kept = KeptDeployment(flow=study, inputs={"configuration": name}, folder=folder, **when)
    return kept, KeptConfiguration(study=study, text=text)


def _study(config: Path, overrides: list[str], name: str, folder: str) -> tuple[Study, str]:
    """Tell which study a file describes, and return its text as it is kept.

    Raises:
        ConfigError: It is not valid.
    """
    from pipeline.config import RunConfig, load_yaml, parse_config, with_overrides
    from pipeline.kept import with_absolute_paths
    from pipeline.paradigms.config import ParadigmsConfig
    from pipeline.settings import to_yaml

    raw = with_overrides(load_yaml(config), overrides)
    raw = {**raw, "name": raw.get("name", name)}
    plain = {key: value for key, value in raw.items() if key != "sharing"}
    of_paradigms = set(raw) & (set(ParadigmsConfig.model_fields) - set(RunConfig.model_fields))
    study: Study = "paradigms" if of_paradigms else "two-stage"
    if study == "paradigms":
        parse_config(plain, ParadigmsConfig, str(config))
    else:
        parse_config(plain, RunConfig, str(config))
    return study, to_yaml(with_absolute_paths(raw, folder))


def _deploy(
    out: Output,
    store: Store,
    name: str,
    kept: KeptDeployment,
    configuration: KeptConfiguration | None,
    server: str,
) -> None:
    from flows.deploying import keep, register_now

    keep(store, name, kept, configuration)
    if server:
        register_now(store, name, reschedule=bool(kept.cron or kept.every_s))
    where = (
        f"It is on the page of {server.removesuffix('/api')} now"
        if server
        else "It comes to the page when `tandem up` is started"
    )
    schedule = _schedule(kept)
    when = f"It runs {schedule}." if schedule else "Give it a schedule there: + Schedule, then Save."
    out.show(
        {"deployment": f"{kept.flow}/{name}", "registered": bool(server), **kept.model_dump(mode="json")},
        f"{name}: {kept.flow} with {_given(kept)}\n{where}. {when}",
    )


def _schedule(kept: KeptDeployment) -> str:
    if kept.cron:
        return f"at {kept.cron} ({kept.timezone})"
    return f"every {kept.every_s:g} s" if kept.every_s else ""


def _given(kept: KeptDeployment) -> str:
    return ", ".join(f"{key} {value}" for key, value in kept.inputs.items()) or "its defaults"


def _remove(out: Output, store: Store, name: str) -> None:
    from flows.running import choose_running_server

    server = choose_running_server(store.url)
    from flows.deploying import remove, unregister_now

    kept = remove(store, name)
    gone = bool(server) and unregister_now(kept.flow, name)
    out.show({"removed": name, "unregistered": gone}, f"{name} is taken away; what its runs made stays.")


def _list(out: Output, store: Store) -> None:
    from pipeline.kept import KeptDeployment, deployments

    shelved = deployments(store)
    found = {name: shelved.read(name, KeptDeployment) for name in shelved.names()}
    document = [{"name": name, **kept.model_dump(mode="json")} for name, kept in found.items()]
    rows = [(name, kept.flow, _schedule(kept), _given(kept)) for name, kept in found.items()]
    out.show(document, table("Deployments", ("name", "flow", "begins with", "inputs"), rows))
