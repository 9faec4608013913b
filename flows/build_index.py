"""Flow ``build-index``: cached vectors in, one searchable FAISS index with its measured recall out."""

from __future__ import annotations

from prefect import State, flow

from features.indexing import IndexConfig
from flows.tasks import run_stage
from pipeline.progress import Reporter
from pipeline.settings import stage_config
from pipeline.stages.build_index import build_index
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "build-index"


@flow(name=NAME, flow_run_name="{kind} index", persist_result=False)
def build_index_flow(
    source: str,
    *,
    kind: str = "auto",
    metric: str = "cosine",
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Build a FAISS index and measure its recall against exact search."""

    def work(opened: Store, reporter: Reporter) -> StageResult:
        config = stage_config(IndexConfig, settings, kind=kind, metric=metric)
        return build_index(opened, source, config, reporter=reporter, force=force)

    return run_stage(NAME, store, work, name=name)
