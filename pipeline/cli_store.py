"""The command line's housekeeping: what the store holds, whether it is whole, what may go."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from pipeline.cli import app
from pipeline.console import (
    DEFAULT_STORE,
    JsonOption,
    Output,
    StoreOption,
    human_bytes,
    open_store,
    table,
)

STORE = "The store"


@app.command("ls", rich_help_panel=STORE)
def list_(
    kind: Annotated[
        str, typer.Argument(help="Only this kind: dataset, features, index, run, comparison ...")
    ] = "",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """List what the store holds, newest last."""
    from pipeline.errors import ConfigError
    from pipeline.manifest import KINDS

    out = Output(as_json=json)
    if kind and kind not in KINDS:
        raise ConfigError(f"There is no kind {kind!r}; known kinds: {', '.join(KINDS)}.")
    opened = open_store(store, out)
    names: dict[str, list[str]] = {}
    for name, pointer in opened.names().items():
        names.setdefault(pointer.key, []).append(name)
    found = sorted(opened.list(kind or None), key=lambda artefact: artefact.manifest.created_at)
    documents = [
        {
            "ref": artefact.ref,
            "key": artefact.key,
            "names": names.get(artefact.key, []),
            "bytes": artefact.manifest.bytes,
            "seconds": artefact.manifest.seconds,
            "created_at": artefact.manifest.created_at.isoformat(),
        }
        for artefact in found
    ]
    rows = [
        (
            artefact.ref,
            human_bytes(artefact.manifest.bytes),
            f"{artefact.manifest.seconds:.1f} s",
            artefact.manifest.created_at.strftime("%m-%d %H:%M"),
            ", ".join(names.get(artefact.key, [])),
        )
        for artefact in found
    ]
    out.show(documents, table(opened.url, ("artefact", "size", "took", "made (UTC)", "names"), rows))


@app.command(rich_help_panel=STORE)
def show(
    ref: Annotated[str, typer.Argument(help="Name, key or folder of an artefact.")],
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Show an artefact: what it was made from, with which settings, and what was measured."""
    out = Output(as_json=json)
    opened = open_store(store, out)
    artefact = opened.get(ref)
    manifest = artefact.manifest.model_dump(mode="json")
    lineage = opened.lineage(artefact)
    text = [artefact.ref, f"  key        {artefact.key}", f"  made       {manifest['created_at']}"]
    size = f"{human_bytes(manifest['bytes'])} in {len(manifest['files'])} files"
    text += [f"  took       {manifest['seconds']:.1f} s, {size}"]
    text += ["", "made from"] + ([f"  {line}" for line in lineage.lines()[1:]] or ["  nothing in this store"])
    for section in ("parameters", "facts"):
        text += ["", section] + [f"  {line}" for line in _flat(manifest[section])]
    out.show(manifest, "\n".join(text))


@app.command(rich_help_panel=STORE)
def name(
    name: Annotated[str, typer.Argument(help="Letters, digits, dashes and dots.")],
    ref: Annotated[str, typer.Argument(help="Artefact to give it to; empty takes the name away.")] = "",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Let a name point at an artefact; named artefacts are never collected."""
    out = Output(as_json=json)
    opened = open_store(store, out)
    if not ref:
        opened.unname(name)
        out.show({"name": name, "ref": ""}, f"{name} points at nothing now")
        return
    artefact = opened.get(ref)
    opened.name(name, artefact)
    out.show({"name": name, "ref": artefact.ref}, f"{name} -> {artefact.ref}")


@app.command(rich_help_panel=STORE)
def verify(
    refs: Annotated[list[str] | None, typer.Argument(help="Artefacts to check; without any, all.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Compare every file with its checksum; exits with 1 if something is damaged."""
    out = Output(as_json=json)
    opened = open_store(store, out)
    with out.reporter.progress("checksums") as progress:
        found = {ref: opened.verify(ref) for ref in refs} if refs else opened.verify_all(progress)
    problems = [str(problem) for listed in found.values() for problem in listed]
    lines = [
        f"{len(found)} artefacts checked, {len(problems)} problems",
        *(f"  {problem}" for problem in problems),
    ]
    out.show({"checked": len(found), "problems": problems}, "\n".join(lines))
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=STORE)
def gc(
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep this artefact and what it was made from.")
    ] = None,
    older_than_days: Annotated[float, typer.Option(min=0, help="Only what was last used longer ago.")] = 30.0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only list what would go.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Delete what nothing needs: no name points at it, and nothing kept was made from it.

    Example: `tandem gc --older-than-days 7 --yes`
    """
    out = Output(as_json=json)
    collected = open_store(store, out).collect_garbage(
        keep=keep or [], older_than=timedelta(days=older_than_days), dry_run=not yes
    )
    gone = [artefact.ref for artefact in collected.artefacts] + [left.address for left in collected.leftovers]
    verb = "deleted" if yes else "would go (--yes deletes)"
    document = {
        "dry_run": collected.dry_run,
        "bytes": collected.bytes,
        "gone": gone,
        "kept": dict(collected.kept),
    }
    size = human_bytes(collected.bytes)
    lines = [f"{len(gone)} artefacts and leftovers, {size}, {verb}; {len(collected.kept)} stay"]
    out.show(document, "\n".join(lines + [f"  {ref}" for ref in gone]))


def _flat(value: Any, prefix: str = "") -> list[str]:
    """One ``dotted.key  value`` line for each leaf of a nested document."""
    if isinstance(value, dict):
        return [
            line
            for key, inner in value.items()
            for line in _flat(inner, f"{prefix}.{key}" if prefix else key)
        ]
    return [f"{prefix:<40} {value}"]
