"""Flow ``build-index``: cached vectors in, one searchable FAISS index with its measured recall out."""

from __future__ import annotations

from prefect import State, flow

from features.indexing import IndexConfig
from flows.tasks import run_stage
from pipeline.stages.build_index import build_index

NAME = "build-index"
DEFAULTS = IndexConfig()


@flow(name=NAME, flow_run_name="{config.kind} index", persist_result=False)
def build_index_flow(
    source: str, *, config: IndexConfig = DEFAULTS, name: str = "", store: str = "", force: bool = False
) -> State[str]:
    """Build a FAISS index and measure its recall against exact search.

    Args:
        source: Name, reference or key of a feature artefact, or of a run (its item embeddings).
        config: Kind of index, metric and memory.
        name: Name to keep the index under; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
    """
    return run_stage(
        NAME,
        store,
        lambda opened, reporter: build_index(opened, source, config, reporter=reporter, force=force),
        name=name,
    )
