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
from pipeline.stages.search_recommender import SearchSettings, search_recommender
from pipeline.stages.train_recommender import RunSettings, train_recommender

if TYPE_CHECKING:
    from features.indexing import IndexConfig
    from pipeline.comparison.config import ComparisonConfig
    from pipeline.datasets.config import DatasetConfig
    from pipeline.store import Store


class Stages(Protocol):
    """The stages, however they are run: as plain functions here, as Prefect subflows in ``flows``."""

    def prepare(self, config: DatasetConfig) -> StageResult:
        """Import, filter and split."""
        ...

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        ...

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index one feature artefact."""
        ...

    def search(self, dataset: str, features: Sequence[str], config: SearchSettings) -> StageResult:
        """Choose one recommender's settings on validation."""
        ...

    def train(
        self, dataset: str, features: Sequence[str], config: RunSettings, search: str = ""
    ) -> StageResult:
        """Train and measure one recommender with one seed, with what a search chose if one is named."""
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

    def search(self, dataset: str, features: Sequence[str], config: SearchSettings) -> StageResult:
        """Choose one recommender's settings on validation."""
        return search_recommender(
            self.store, dataset, features, config, reporter=self.reporter, force=self.force
        )

    def train(
        self, dataset: str, features: Sequence[str], config: RunSettings, search: str = ""
    ) -> StageResult:
        """Train and measure one recommender with one seed, with what a search chose if one is named."""
        return train_recommender(
            self.store, dataset, features, config, search=search, reporter=self.reporter, force=self.force
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
    searches: list[StageResult] = field(default_factory=list)
    runs: list[StageResult] = field(default_factory=list)
    comparison: StageResult | None = None

    def all(self) -> list[StageResult]:
        """Every stage's result."""
        comparison = [self.comparison] if self.comparison else []
        made = [*self.features.values(), *self.indexes, *self.searches, *self.runs]
        return [self.dataset, *made, *comparison]


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
            chosen = ""
            wanted = search_settings(config, recommender)
            if wanted is not None:
                found = note(stages.search(dataset.artefact.key, features, wanted))
                result.searches.append(found)
                chosen = found.artefact.key
            for seed in config.seeds:
                settings = run_settings(config, recommender, seed)
                run = stages.train(dataset.artefact.key, features, settings, search=chosen)
                result.runs.append(note(run))
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


def run_settings(config: RunConfig, recommender: RecommenderConfig, seed: int) -> RunSettings:
    """Return how a configuration trains and measures one recommender with one seed."""
    return RunSettings(
        model=recommender.model,
        settings=recommender.settings,
        reading=config.reading,
        training=config.training,
        evaluation=config.evaluation,
        seed=seed,
        device=config.device,
    )


def search_settings(config: RunConfig, recommender: RecommenderConfig) -> SearchSettings | None:
    """Return what is searched of a recommender, with the first seed; None where nothing is."""
    if not config.search.enabled:
        return None
    run = run_settings(config, recommender, config.seeds[0])
    settings = SearchSettings.model_validate({**run.model_dump(), "search": config.search.plain()})
    return settings if settings.space() else None
