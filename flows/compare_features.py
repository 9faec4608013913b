"""Flow ``compare-features``: runs in, one comparison of their feature sets and recommenders out."""

from __future__ import annotations

from prefect import State, flow

from flows.tasks import run_stage
from pipeline.comparison.config import ComparisonConfig
from pipeline.stages.compare_features import compare_features

NAME = "compare-features"
DEFAULTS = ComparisonConfig()


@flow(name=NAME, flow_run_name="{config.metric}", persist_result=False)
def compare_features_flow(
    runs: list[str],
    *,
    config: ComparisonConfig = DEFAULTS,
    name: str = "",
    store: str = "",
    force: bool = False,
) -> State[str]:
    """Compare runs: mean and spread over seeds, intervals, paired tests, floors and costs.

    Args:
        runs: Names, references or keys of the runs.
        config: Which metric decides, which cut-off, which tests.
        name: Name to keep the comparison under; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
    """
    return run_stage(
        NAME,
        store,
        lambda opened, reporter: compare_features(opened, runs, config, reporter=reporter, force=force),
        name=name,
    )
