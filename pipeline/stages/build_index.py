"""Stage: the embeddings of a feature artefact or of a run's items in, one searchable FAISS index out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from features import indexing
from features.feature_table import FeatureSet
from features.indexing import IndexConfig, save_index
from pipeline.errors import ConfigError
from pipeline.progress import SILENT, Reporter
from pipeline.stages.result import StageResult

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store

SEED = 0
"""Of training and of the sample that recall is measured on: one index per configuration."""
ITEM_EMBEDDINGS = "item_embeddings.parquet"
"""The items' embeddings in a run artefact, in the layout of feature parts."""


def build_index(
    store: Store, source: str, config: IndexConfig, *, reporter: Reporter = SILENT, force: bool = False
) -> StageResult:
    """Index what has a vector and measure the index's recall against exact search.

    Args:
        store: Where the vectors lie and the index goes.
        source: Name, key or folder of a feature artefact or of a run.
        config: Kind of index, metric, memory budget.
        reporter: Told which kind was chosen and on which backend it was built.
        force: Build it again although the store has it.

    Raises:
        ConfigError: The source holds no vectors.
        IndexingError: The index cannot be built as asked.
    """
    made_from = store.get(source)
    vector_files(made_from)  # refuses what cannot be indexed before anything is looked up or made

    def make(draft: Draft) -> None:
        vectors, item_ids = present_vectors(vector_files(made_from))
        with reporter.progress(f"index {made_from.slug}") as progress:
            built = indexing.build_index(vectors, config, np.random.default_rng(SEED), progress=progress)
        save_index(built.index, draft.path("index.faiss"))
        pl.DataFrame({"item_id": item_ids}).write_parquet(draft.path("item_ids.parquet"))
        report = built.report
        reporter.say(f"  {report.kind} on {report.device} ({report.device_reason}): {report.reason}")
        for note in report.notes:
            reporter.say(f"  {note}")
        summary: dict[str, JsonValue] = {"kind": report.kind, "vectors": report.n_vectors}
        if report.recall is not None:
            summary[f"recall@{report.recall_k}"] = report.recall
        draft.record(**json.loads(json.dumps(asdict(report))), summary=summary)

    outcome = store.produce(
        "index",
        slug=f"{config.kind}-{made_from.slug}",
        identity={"vectors": made_from.key, "config": config.model_dump(mode="json")},
        inputs=[made_from.as_input("vectors")],
        parameters={**config.model_dump(mode="json"), "source": _source(made_from)},
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def vector_files(made_from: Artefact) -> list[Path]:
    """The files that hold an artefact's vectors.

    Raises:
        ConfigError: It is no feature artefact, and no run that is scored by inner products.
    """
    if made_from.kind == "features":
        return made_from.paths("part-*.parquet")
    if made_from.kind == "run" and ITEM_EMBEDDINGS in made_from.manifest.files:
        return [made_from.path(ITEM_EMBEDDINGS)]
    raise ConfigError(
        f"{made_from.ref} holds no vectors to index; give a feature artefact, or a run of a model that is "
        "scored by inner products (item kNN is not)."
    )


def present_vectors(paths: list[Path]) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Read the (N, F) float32 vectors of the items that have one, and their ids."""
    features = FeatureSet.read(paths)
    present = features.present
    item_ids: list[str] = features.item_ids.filter(pl.Series(present.numpy())).to_list()
    vectors: npt.NDArray[np.float32] = features.vectors[present].float().numpy()
    return vectors, item_ids


def _source(made_from: Artefact) -> dict[str, JsonValue]:
    """What the vectors are, so that a query by text or picture finds its encoder."""
    shown = made_from.manifest.parameters
    return {name: shown[name] for name in ("encoder", "modality", "model") if name in shown} | {
        "ref": made_from.ref
    }
