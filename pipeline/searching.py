"""A search as people and programs read it: what was chosen, and the trials that came near."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from rich import box
from rich.table import Table

from pipeline.stages.search_recommender import STUDY_FILE

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact

TOP = 5
"""Trials shown."""


def best_trials(search: Artefact, count: int = TOP) -> list[dict[str, Any]]:
    """Return the best finished trials, best first: number, value, epochs, seconds and each setting."""
    settings = [str(name) for name in _section(search.manifest.parameters["space"])]
    table = pl.read_parquet(search.path(STUDY_FILE)).filter(pl.col("state") == "complete")
    best = table.sort("value", "number", descending=[True, False]).head(count)
    return best.select("number", "value", "epochs", "best_epoch", "seconds", *settings).to_dicts()


def search_document(search: Artefact) -> dict[str, Any]:
    """Return what ``--json`` adds to the stage's document: the choice, the best trials, how many of each."""
    facts = search.manifest.facts
    return {
        "best": facts["best"],
        "trials": facts["trials"],
        "best_trials": best_trials(search),
        "space": search.manifest.parameters["space"],
    }


def search_table(search: Artefact) -> Table:
    """Return the best trials, the chosen one marked, with what was tried below."""
    shown, facts = search.manifest.parameters, search.manifest.facts
    training, states = _section(shown["training"]), _section(facts["trials"])
    settings = [str(name) for name in _section(shown["space"])]
    how = _section(shown["search"])
    table = Table(
        title=f"{shown['model']} on {shown['feature_set']}: "
        f"best of {facts['n_trials']} trials ({how['method']})",
        caption=f"{states['complete']} finished, {states['pruned']} ended early, {states['failed']} failed. "
        "Chosen (*) on validation; test was not read.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for name in ("trial", f"valid {training['monitor']}", *settings, "best epoch", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, trial in enumerate(best_trials(search)):
        table.add_row(
            "" if place else "*",
            str(trial["number"]),
            f"{trial['value']:.4f}",
            *(_short(trial[name]) for name in settings),
            f"{trial['best_epoch']} of {trial['epochs']}",
            f"{trial['seconds']:.1f}",
            style="" if place else "bold",
        )
    return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}
