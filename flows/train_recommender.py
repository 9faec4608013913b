"""Flow ``train-recommender``: a dataset and cached features in, one trained and measured recommender out."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.progress import Reporter
from pipeline.selecting import listed
from pipeline.settings import stage_config
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import RunSettings, train_recommender
from pipeline.store import Store

NAME = "train-recommender"


@flow(name=NAME, flow_run_name="{model} seed {seed}", persist_result=False)
def train_recommender_flow(
    dataset: str,
    *,
    features: str = "",
    model: str = "vbpr",
    seed: int = 0,
    search: str = "",
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Train one recommender with one seed, choose its epoch on validation and measure it on test once."""

    def work(opened: Store, reporter: Reporter) -> StageResult:
        config = stage_config(RunSettings, settings, model=model, seed=seed)
        read = listed(features)
        return train_recommender(opened, dataset, read, config, search=search, reporter=reporter, force=force)

    def following(result: StageResult) -> list[NextStep]:
        ref = result.artefact.ref
        return [
            NextStep("Compare this run with others", "compare-features", {"runs": ref, "store": store}),
            NextStep("Build an index of its items", "build-index", {"source": ref, "store": store}),
        ]

    return run_stage(NAME, store, work, name=name, following=following)
