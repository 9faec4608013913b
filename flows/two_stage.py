"""Flow ``two-stage``: a whole configuration, each stage as a subflow in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

from features.indexing import IndexConfig
from flows.build_index import build_index_flow
from flows.compare_features import compare_features_flow
from flows.extract_features import extract_features_flow
from flows.prepare_dataset import prepare_dataset_flow
from flows.reporting import TERMINAL, artifact_key, markdown_table, name_run, short
from flows.search_recommender import search_recommender_flow
from flows.shards import ALONE, Sharing
from flows.subflows import run_subflow
from flows.tasks import CACHED, failed, store_address
from flows.train_recommender import train_recommender_flow
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import RunConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import USER_ERRORS
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.result import StageResult
from pipeline.stages.search_recommender import SearchSettings
from pipeline.stages.train_recommender import RunSettings
from pipeline.store import Store
from pipeline.two_stage import TwoStageResult, run_two_stage

NAME = "two-stage"
DEFAULTS = RunConfig()


@flow(name=NAME, flow_run_name="{config.name}", persist_result=False)
def two_stage_flow(
    config: RunConfig = DEFAULTS, *, store: str = "", force: bool = False, sharing: Sharing = ALONE
) -> State[TwoStageResult]:
    """Run a whole configuration: dataset, features, indexes, recommenders, comparison; what exists is reused.

    Args:
        config: The dataset, the feature sets to compare, and the recommenders that read them.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make every artefact again although the store has it.
        sharing: In how many shares, and by how many workers, pictures and texts are encoded.
    """
    try:
        opened = Store(store_address(store))
        stages = SubflowStages(opened, store_address(store), force=force, sharing=sharing)
        result = run_two_stage(config, stages, lambda stage: TERMINAL.get().say(stage.line()))
        if result.comparison is not None:
            opened.name(config.name, result.comparison.artefact)
    except USER_ERRORS as error:
        return failed(error)
    message = show_stages(config.name, result)
    if all(stage.reused for stage in result.all()):
        name_run(config.name, reused=True)
        return Completed(name=CACHED, message=message, data=result)
    return Completed(message=message, data=result)


@dataclass(frozen=True)
class SubflowStages:
    """The stages of ``pipeline.two_stage.Stages``, each a subflow: keys go in, a reference comes back."""

    store: Store
    address: str
    force: bool = False
    sharing: Sharing = ALONE

    def prepare(self, config: DatasetConfig) -> StageResult:
        """Import, filter and split."""
        return self._run(prepare_dataset_flow, config=config)

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        return self._run(extract_features_flow, dataset=dataset, config=config, sharing=self.sharing)

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index one feature artefact."""
        return self._run(build_index_flow, source=source, config=config)

    def search(self, dataset: str, features: Sequence[str], config: SearchSettings) -> StageResult:
        """Choose one recommender's settings on validation."""
        return self._run(search_recommender_flow, dataset=dataset, features=list(features), config=config)

    def train(
        self, dataset: str, features: Sequence[str], config: RunSettings, search: str = ""
    ) -> StageResult:
        """Train and measure one recommender with one seed, with what a search chose if one is named."""
        what = {"dataset": dataset, "features": list(features), "config": config, "search": search}
        return self._run(train_recommender_flow, **what)

    def compare(self, runs: Sequence[str], config: ComparisonConfig) -> StageResult:
        """Compare all runs."""
        return self._run(compare_features_flow, runs=list(runs), config=config)

    def _run(self, subflow: Callable[..., State[State[str]]], **parameters: Any) -> StageResult:
        return run_subflow(self.store, subflow, store=self.address, force=self.force, **parameters)


def show_stages(name: str, result: TwoStageResult) -> str:
    """Leave the stages and the comparison as a page and a table; returns how many were reused."""
    every = result.all()
    n_reused = sum(stage.reused for stage in every)
    message = f"{len(every)} stages, {n_reused} reused"
    best = result.comparison.summary if result.comparison else {}
    headline = ", ".join([message, *(f"{name} {short(value)}" for name, value in best.items())])
    rows = [
        {
            "artefact": stage.artefact.ref,
            "state": "reused" if stage.reused else "made",
            "seconds": round(stage.artefact.manifest.seconds, 1),
            "figures": ", ".join(f"{key} {short(value)}" for key, value in stage.summary.items()),
        }
        for stage in every
    ]
    create_table_artifact(rows, key=artifact_key(NAME, name, "stages"), description=headline)
    page = [f"# {name}", message]
    if result.comparison is not None:
        page.append(result.comparison.artefact.path("comparison.md").read_text(encoding="utf-8"))
    page.append(
        markdown_table(("artefact", "state", "seconds", "figures"), [list(row.values()) for row in rows])
    )
    create_markdown_artifact("\n\n".join(page), key=artifact_key(NAME, name), description=headline)
    return message
