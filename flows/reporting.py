"""What a flow shows in the UI: progress while it works, artifacts and a badge when it is done."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect import get_client, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL, get_current_settings

from flows.server.environment import LOGGED_PACKAGES
from pipeline.progress import SILENT, Reporter

if TYPE_CHECKING:
    from pipeline.stages.result import StageResult

TERMINAL: ContextVar[Reporter] = ContextVar("TERMINAL", default=SILENT)
"""Where ``tandem run`` shows what its flows report, beside the UI."""
UPDATE_EVERY_S = 2.0
"""A progress artifact is sent this often at most: each update is a request to the server."""
REUSED_TAG = "reused"
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
Cell = str | int | float | bool | None

# Prefect adds its handler to these loggers, but leaves their level at WARNING.
for _package in LOGGED_PACKAGES:
    logging.getLogger(_package).setLevel(logging.INFO)


class PrefectReporter:
    """Sends a stage's words to the run's log and its progress to an artifact, and both to the terminal."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.terminal = TERMINAL.get()
        self.log = get_run_logger()

    def say(self, message: str) -> None:
        """Log one line."""
        self.log.info(message.strip())
        self.terminal.say(message)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Open a progress artifact once there is progress to show."""
        artifact = _ProgressArtifact(artifact_key(self.stage, "progress"), self.log)
        last = -UPDATE_EVERY_S

        with self.terminal.progress(description) as show:

            def advance(done: int, total: int) -> None:
                nonlocal last
                show(done, total)
                now = monotonic()
                if now - last < UPDATE_EVERY_S:
                    return
                last = now
                words = f"{description}: {done:,} of {total:,}" if total else f"{description}: {done:,}"
                artifact.show(100.0 * done / total if total else 0.0, words)

            yield advance
            if artifact.id is not None:
                artifact.show(100.0, f"{description}: done")


class _ProgressArtifact:
    """One progress artifact; a server that does not answer must not end hours of work."""

    def __init__(self, key: str, log: Log) -> None:
        self.key = key
        self.log = log
        self.id: UUID | None = None

    def show(self, percent: float, words: str) -> None:
        """Make the artifact, or change it."""
        try:
            if self.id is None:
                self.id = create_progress_artifact(percent, key=self.key, description=words)  # type: ignore[assignment]  # no coroutine outside of an event loop
            else:
                update_progress_artifact(self.id, progress=percent, description=words)
        except httpx.HTTPError as error:
            self.log.warning("The server did not take the progress (%s); the work goes on.", error)


def artifact_key(*parts: str) -> str:
    """A key that Prefect takes: lower case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def headline(result: StageResult) -> str:
    """The numbers to see without opening anything: an artifact's content is two clicks away."""
    numbers = ", ".join(f"{name} {short(value)}" for name, value in result.summary.items())
    state = "reused" if result.reused else f"{result.artefact.manifest.seconds:.1f} s"
    return f"{state} · {numbers}" if numbers else state


def short(value: object) -> str:
    """A figure with four digits that matter; the UI does not round."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_result(stage: str, result: StageResult, following: Sequence[NextStep] = ()) -> None:
    """Leave a stage's result as a page, a table and a link.

    The keys hold the artefact's slug, so that the time line of a key shows one thing over its runs.
    """
    key = artifact_key(stage, result.artefact.slug)
    create_markdown_artifact(result_page(stage, result, following), key=key, description=headline(result))
    rows = result_rows(result)
    create_table_artifact(rows, key=artifact_key(key, "figures"), description=headline(result))
    link = next(((step.title, url) for step in following if (url := step.url())), None)
    text, address = link or (result.artefact.ref, result.artefact.folder_url)
    create_link_artifact(address, link_text=text, key=artifact_key(key, "link"), description=text)


def result_rows(result: StageResult) -> list[dict[str, Cell]]:
    """What a stage's table shows: metrics of a run or of all compared rows, else the headline numbers."""
    import polars as pl  # noqa: PLC0415 - registering the flows does not need it

    artefact = result.artefact
    if artefact.kind == "run":
        metrics = pl.read_parquet(artefact.path("metrics.parquet")).with_columns(pl.col("value").round(6))
        return metrics.pivot("part", index="metric", values="value").to_dicts()
    if artefact.kind == "comparison":
        rows = pl.read_parquet(artefact.path("comparison.parquet"))
        figures = [pl.col(name).round(6) for name in ("valid", "test", "test_sd")]
        return rows.select("row", "metric", "n_seeds", *figures).to_dicts()
    return [{"figure": name, "value": short(value)} for name, value in result.summary.items()]


def result_page(stage: str, result: StageResult, following: Sequence[NextStep] = ()) -> str:
    """What one stage made, from what, with which figures, and what can be done with it, as Markdown."""
    artefact = result.artefact
    manifest = artefact.manifest
    figures = [(name, short(value)) for name, value in result.summary.items()]
    inputs = [(found.role or found.kind, f"`{found.kind}` `{found.key[:12]}`") for found in manifest.inputs]
    about = [
        ("state", "reused: the store had it" if result.reused else f"made in {manifest.seconds:.1f} s"),
        ("reference", f"`{artefact.ref}`"),
        ("key", f"`{artefact.key}`"),
        ("folder", f"`{artefact.folder_url}`"),
        ("created", str(manifest.created_at)),
        ("size", f"{manifest.bytes:,} bytes"),
    ]
    parts = [f"# {stage}: {artefact.slug}", markdown_table(("figure", "value"), figures)]
    if artefact.kind == "comparison":
        parts.append(artefact.path("comparison.md").read_text(encoding="utf-8"))
    parts += ["## Artefact", markdown_table(("", ""), about)]
    if inputs:
        parts += ["## Made from", markdown_table(("role", "artefact"), inputs)]
    steps = [f"- [{step.title}]({url})" for step in following if (url := step.url())]
    if steps:
        parts += ["## Next", "\n".join(steps)]
    parts += [
        "<details><summary>Parameters</summary>",
        f"```json\n{json.dumps(manifest.parameters, indent=2)}\n```",
    ]
    parts += ["</details>"]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in GitHub's Markdown; bars inside cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


class NextStep:
    """A stage that can go on from a result: a link to its form with the parameters filled in."""

    def __init__(self, title: str, flow: str, parameters: Mapping[str, Any]) -> None:
        self.title = title
        self.flow = flow
        self.parameters = parameters

    def url(self) -> str:
        """Address of the filled-in form; "" where the flow is not served or the server has no address."""
        deployment = deployment_id(self.flow)
        ui = ui_url()
        if not deployment or not ui:
            return ""
        return (
            f"{ui}/v2/deployments/deployment/{deployment}/run?parameters={quote(json.dumps(self.parameters))}"
        )


def ui_url() -> str:
    """Where the UI is, without a slash at the end; "" for a server without an address of its own."""
    if get_current_settings().api.url is None:
        return ""
    return str(PREFECT_UI_URL.value() or "").rstrip("/")


@lru_cache(maxsize=32)
def deployment_id(flow: str) -> str:
    """The id of a flow's deployment; "" where it is not served."""
    with get_client(sync_client=True) as client:
        try:
            return str(client.read_deployment_by_name(f"{flow}/{flow}").id)
        except ObjectNotFound:
            return ""


def name_run(made: str, *, reused: bool) -> None:
    """Name the run after what it made, and tag it where nothing was computed, for the list of runs."""
    run_id, tags = runtime.flow_run.id, {*(runtime.flow_run.tags or [])}
    if run_id is None:
        return
    if reused:
        made, tags = f"{made} (reused)", {*tags, REUSED_TAG}
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(run_id), tags=tags, name=made)
