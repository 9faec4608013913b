"""What a trained recommender leaves: its weights and embeddings, and what was measured of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl
import torch
from safetensors.torch import save_file

from features.parts import PartRows, write_part
from pipeline.measuring import beyond_accuracy, by_group, exposure
from pipeline.stages.build_index import ITEM_EMBEDDINGS
from recommenders.evaluation import Evaluation, EvaluationConfig, evaluate_part

if TYPE_CHECKING:
    from pipeline.reading import Dataset
    from pipeline.store import Artefact, Draft
    from recommenders.feature_input import FeatureTable
    from recommenders.models.base import Recommender

USER_EMBEDDINGS = "user_embeddings.parquet"


def measure_and_write(
    draft: Draft,
    model: Recommender,
    table: FeatureTable,
    *,
    data: Artefact,
    dataset: Dataset,
    config: EvaluationConfig,
    monitor: str,
    device: torch.device,
    best_epoch: int,
) -> None:
    """Measure validation, and the test part once, and write all that a run consists of but its history.

    Args:
        draft: Of kind ``run``.
        model: As validation chose it, on the device.
        table: What it reads, on the device.
        data: The dataset artefact.
        dataset: The same, read.
        config: How it is measured.
        monitor: The metric that chose, for the summary.
        device: Where scores are made.
        best_epoch: For the summary.
    """
    started = time.perf_counter()
    model.eval()
    scorer = model.scorer(table)
    split = dataset.split
    valid = evaluate_part(scorer, split, "valid", config, device=device, keep_lists=True)
    test = evaluate_part(  # once, after the choice
        scorer, split, "test", config, device=device, keep_lists=True
    )
    evaluate_seconds = time.perf_counter() - started
    _write_model(draft, model, table, dataset)
    items = pl.read_parquet(data.path("items.parquet"))
    more = {
        "valid": exposure(valid, split, config),
        "test": beyond_accuracy(test, split, table, items, config),
    }
    _write_metrics(draft, valid, test, more)
    by_group(test, split, table, config).write_parquet(draft.path("groups.parquet"))
    draft.record(
        evaluate_seconds=evaluate_seconds,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        scoring=model.scoring,
        summary={
            "best epoch": best_epoch,
            f"valid {monitor}": valid.metrics[monitor],
            f"test {monitor}": test.metrics[monitor],
        },
    )


@torch.no_grad()
def _write_model(draft: Draft, model: Recommender, table: FeatureTable, dataset: Dataset) -> None:
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(state, draft.path("model.safetensors"))
    if model.scoring != "inner_product":
        return
    users, items = model(table)
    for name, ids, vectors in (
        (USER_EMBEDDINGS, dataset.user_ids, users),
        (ITEM_EMBEDDINGS, dataset.item_ids, items),
    ):
        absent: list[None] = [None] * len(ids)
        array = vectors.float().cpu().numpy()
        write_part(draft.path(name), PartRows(ids, absent, ["ok"] * len(ids), absent, array))


def _write_metrics(
    draft: Draft, valid: Evaluation, test: Evaluation, more: Mapping[str, Mapping[str, float]]
) -> None:
    """Write what was measured, and by part what lists are like beyond accuracy."""
    rows = [
        {"part": part, "metric": metric, "value": value}
        for part, measured in (("valid", valid), ("test", test))
        for metric, value in {**measured.metrics, **more[part]}.items()
    ]
    pl.DataFrame(rows).write_parquet(draft.path("metrics.parquet"))
    test.per_user.write_parquet(draft.path("per_user.parquet"))
    draft.record(test_users=test.n_users, valid_users=valid.n_users)
