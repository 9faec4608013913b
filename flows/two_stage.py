"""Flow ``two-stage``: a whole configuration, each stage as a subflow in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed
from pydantic import NonNegativeInt

from features.indexing import IndexConfig
from flows.build_index import build_index_flow
from flows.compare_features import compare_features_flow
from flows.extract_features import extract_features_flow
from flows.prepare_dataset import prepare_dataset_flow
from flows.reporting import TERMINAL, artifact_key, markdown_table, name_run, short
from flows.search_recommender import run_inputs, search_recommender_flow
from flows.shards import ALONE, Sharing
from flows.studies import StudyForm, keep_study, study_run_name
from flows.subflows import run_subflow
from flows.tasks import CACHED, failed, store_address
from flows.train_recommender import train_recommender_flow
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import RunConfig, parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import USER_ERRORS
from pipeline.kept import Study
from pipeline.settings import inputs_of
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.result import StageResult
from pipeline.stages.search_recommender import SearchSettings
from pipeline.stages.train_recommender import RunSettings
from pipeline.store import Store
from pipeline.two_stage import TwoStageResult, run_two_stage

NAME: Study = "two-stage"


@flow(name=NAME, flow_run_name=study_run_name, persist_result=False)
def two_stage_flow(
    *,
    configuration: str = "",
    name: str = "",
    items: str = "",
    interactions: str = "",
    pictures: str = "",
    encoders: str = "",
    recommenders: str = "",
    seeds: NonNegativeInt = 0,
    keep_as: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[TwoStageResult]:
    """Run a whole configuration, from the dataset to the comparison; what exists is reused."""
    form = StudyForm(
        configuration=configuration,
        name=name,
        items=items,
        interactions=interactions,
        pictures=pictures,
        encoders=encoders,
        recommenders=recommenders,
        seeds=seeds,
        settings=settings,
    )
    try:
        opened = Store(store_address(store))
        raw, sharing = form.raw(opened, NAME)
        config = parse_config(raw, RunConfig, "settings")
        name_run(config.name, reused=False)
        if keep_as:
            keep_study(opened, keep_as, NAME, raw, sharing)
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
        return self._run(prepare_dataset_flow, **inputs_of(config, "importer"))

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        what = inputs_of(config, "encoder", "modality", sharing=self.sharing)
        return self._run(extract_features_flow, dataset=dataset, **what)

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index one feature artefact."""
        return self._run(build_index_flow, source=source, **inputs_of(config, "kind", "metric"))

    def search(self, dataset: str, features: Sequence[str], config: SearchSettings) -> StageResult:
        """Choose one recommender's settings on validation."""
        what = {"features": ", ".join(features), "trials": config.search.n_trials}
        return self._run(search_recommender_flow, dataset=dataset, **what, **inputs_of(config, "model"))

    def train(
        self, dataset: str, features: Sequence[str], config: RunSettings, search: str = ""
    ) -> StageResult:
        """Train and measure one recommender with one seed, with what a search chose if one is named."""
        what = {"dataset": dataset, "features": ", ".join(features), "search": search}
        return self._run(train_recommender_flow, **what, **run_inputs(config))

    def compare(self, runs: Sequence[str], config: ComparisonConfig) -> StageResult:
        """Compare all runs."""
        return self._run(compare_features_flow, runs=", ".join(runs), **inputs_of(config, "metric"))

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
