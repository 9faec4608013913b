"""What the UI shows of how an encoder was trained: a table with an epoch a row, and its curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.charts import curves
from flows.reporting import Cell, artifact_key, headline
from pipeline.stages.train_jointly import HISTORY_FILE

if TYPE_CHECKING:
    from pipeline.stages.result import StageResult
    from pipeline.store import Artefact

DRAWN = ("loss", "valid_loss", "retrieval", "gradient_norm")
"""Columns, or how they begin, of which curves are drawn; beside them the metric that chose the epoch."""


def show_history(flow: str, result: StageResult) -> None:
    """Leave losses, gradient norms and what was measured of an encoder artefact as a table and as curves."""
    key = artifact_key(flow, result.artefact.slug, "history")
    rows = history_rows(result.artefact)
    create_table_artifact(rows, key=key, description=headline(result))
    training = result.artefact.manifest.parameters.get("training")
    monitored = f"valid_{training['monitor']}" if isinstance(training, dict) else ""
    names = [name for name in rows[0] if name.startswith(DRAWN) or name == monitored] if rows else []
    if page := curves(rows, names):
        create_markdown_artifact(page, key=artifact_key(key, "curves"), description=headline(result))


def history_rows(encoder: Artefact) -> list[dict[str, Cell]]:
    """The history of a trained encoder with figures that a person can read."""
    history = pl.read_parquet(encoder.path(HISTORY_FILE))
    readable = [pl.col(name).round_sig_figs(4) for name, of in history.schema.items() if of == pl.Float64]
    columns = [pl.col("epoch").cast(pl.Int64)]
    columns += [pl.col("joint") > 0] if "joint" in history.columns else []
    rows: list[dict[str, Cell]] = history.with_columns(*readable).with_columns(*columns).to_dicts()
    return rows
