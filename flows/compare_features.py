"""Flow ``compare-features``: runs in, one comparison of their feature sets and recommenders out."""

from __future__ import annotations

from prefect import State, flow

from flows.tasks import run_stage
from pipeline.comparison.config import ComparisonConfig
from pipeline.progress import Reporter
from pipeline.selecting import listed, runs_meant
from pipeline.settings import stage_config
from pipeline.stages.compare_features import compare_features
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "compare-features"


@flow(name=NAME, flow_run_name="{metric}", persist_result=False)
def compare_features_flow(
    runs: str,
    *,
    metric: str = "recall@20",
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Compare runs: mean and spread over seeds, intervals, paired tests, floors and costs."""

    def work(opened: Store, reporter: Reporter) -> StageResult:
        config = stage_config(ComparisonConfig, settings, metric=metric)
        return compare_features(
            opened, runs_meant(opened, listed(runs)), config, reporter=reporter, force=force
        )

    return run_stage(NAME, store, work, name=name)
