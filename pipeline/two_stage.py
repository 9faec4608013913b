"""The whole first way: dataset, features, indexes, recommenders, comparison, stage after stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pipeline.config import RecommenderConfig, RunConfig
from pipeline.progress import SILENT, Reporter
from pipeline.stages.build_index import build_index
from pipeline.stages.compare_features import compare_features
from pipeline.stages.extract_features import CONTROLS, FeaturesConfig, extract_features
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import RunSettings, train_recommender

if TYPE_CHECKING:
    from features.indexing import IndexConfig
    from pipeline.comparison.config import ComparisonConfig
    from pipeline.datasets.config import DatasetConfig
    from pipeline.store import Store


class Stages(Protocol):
    """The five stages, however they are run: as plain functions here, as Prefect subflows in ``flows``."""

    def prepare(self, config: DatasetConfig) -> StageResult:
        """Import, filter and split."""
        ...

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        ...

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index one feature artefact."""
        ...

    def train(self, dataset: str, features: Sequence[str], config: RunSettings) -> StageResult:
        """Train and measure one recommender with one seed."""
        ...

    def compare(self, runs: Sequence[str], config: ComparisonConfig) -> StageResult:
        """Compare all runs."""
        ...


@dataclass(frozen=True)
class PlainStages:
    """The stages called one after the other in this process."""

    store: Store
    reporter: Reporter = SILENT
    force: bool = False

    def prepare(self, config: DatasetConfig) -> StageResult:
        """Import, filter and split."""
        return prepare_dataset(self.store, config, reporter=self.reporter, force=self.force)

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        return extract_features(self.store, dataset, config, reporter=self.reporter, force=self.force)

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index one feature artefact."""
        return build_index(self.store, source, config, reporter=self.reporter, force=self.force)

    def train(self, dataset: str, features: Sequence[str], config: RunSettings) -> StageResult:
        """Train and measure one recommender with one seed."""
        return train_recommender(
            self.store, dataset, features, config, reporter=self.reporter, force=self.force
        )

    def compare(self, runs: Sequence[str], config: ComparisonConfig) -> StageResult:
        """Compare all runs."""
        return compare_features(self.store, runs, config, reporter=self.reporter, force=self.force)


@dataclass
class TwoStageResult:
    """Every stage's result, in the order they ran."""

    dataset: StageResult
    features: dict[tuple[str, str], StageResult] = field(default_factory=dict)
    """(modality, encoder) -> feature artefact."""
    indexes: list[StageResult] = field(default_factory=list)
    runs: list[StageResult] = field(default_factory=list)
    comparison: StageResult | None = None

    def all(self) -> list[StageResult]:
        """Every stage's result."""
        comparison = [self.comparison] if self.comparison else []
        return [self.dataset, *self.features.values(), *self.indexes, *self.runs, *comparison]


def run_two_stage(
    config: RunConfig, stages: Stages, done: Callable[[StageResult], None] | None = None
) -> TwoStageResult:
    """Run a whole configuration; what the store holds already is reused.

    Args:
        config: What to make.
        stages: How a stage is run.
        done: Told of each stage's result as it comes.
    """

    def note(result: StageResult) -> StageResult:
        if done is not None:
            done(result)
        return result

    dataset = note(stages.prepare(config.dataset))
    result = TwoStageResult(dataset)
    for modality, encoder in _wanted_features(config):
        what = FeaturesConfig(
            encoder=encoder,
            modality=modality,
            text=config.text,
            extraction=config.extraction,
            device=config.device,
        )
        made = note(stages.extract(dataset.artefact.key, what))
        result.features[modality, encoder] = made
        if not encoder.startswith(CONTROLS):
            result.indexes.append(note(stages.index(made.artefact.key, config.index)))
    for recommender in config.recommenders:
        for features in _feature_keys(config, recommender, result):
            for seed in config.seeds:
                settings = _run_settings(config, recommender, seed)
                result.runs.append(note(stages.train(dataset.artefact.key, features, settings)))
    result.comparison = note(stages.compare([run.artefact.key for run in result.runs], config.comparison))
    return result


def _wanted_features(config: RunConfig) -> list[tuple[str, str]]:
    """Each (modality, encoder) once, in the order of the feature sets."""
    pairs = [pair for feature_set in config.feature_sets for pair in feature_set.encoders()]
    return list(dict.fromkeys(pairs))


def _feature_keys(
    config: RunConfig, recommender: RecommenderConfig, result: TwoStageResult
) -> list[list[str]]:
    """What one recommender is trained on: each feature set, or nothing once if it reads none."""
    if not recommender.reads_features:
        return [[]]
    return [
        [result.features[pair].artefact.key for pair in feature_set.encoders()]
        for feature_set in config.feature_sets
    ]


def _run_settings(config: RunConfig, recommender: RecommenderConfig, seed: int) -> RunSettings:
    return RunSettings(
        model=recommender.model,
        settings=recommender.settings,
        reading=config.reading,
        training=config.training,
        evaluation=config.evaluation,
        seed=seed,
        device=config.device,
    )
