"""Stages that do the same thing once, whoever asks for it again, and that say so once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.stages.result import StageResult

if TYPE_CHECKING:
    from pydantic import BaseModel

    from features.encoders.base import EncoderInfo
    from features.indexing import IndexConfig
    from pipeline.comparison.config import ComparisonConfig
    from pipeline.datasets.config import DatasetConfig
    from pipeline.device import DeviceChoice
    from pipeline.paradigms.way import ParadigmStages
    from pipeline.stages.extract_features import FeaturesConfig
    from pipeline.stages.finetune_encoder import FinetuneSettings
    from pipeline.stages.keep_states import StatesConfig
    from pipeline.stages.search_recommender import SearchSettings
    from pipeline.stages.train_jointly import JointSettings
    from pipeline.stages.train_recommender import RunSettings


class OnceStages:
    """Stages with a memory.

    The store would find everything again; but not where all is made again (``force``), and each look costs a
    subflow under Prefect.
    """

    def __init__(self, stages: ParadigmStages, done: Callable[[StageResult], None] | None = None) -> None:
        self.stages = stages
        self.results: list[StageResult] = []
        """Each result once, in the order they came."""
        self._done = done
        self._known: dict[tuple[str, ...], StageResult] = {}

    def describe(self, encoder: str) -> EncoderInfo:
        """Say what an encoder is."""
        return self.stages.describe(encoder)

    def prepare(self, config: DatasetConfig) -> StageResult:
        """Import, filter and split."""
        return self._once(lambda: self.stages.prepare(config), "prepare", config)

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        return self._once(lambda: self.stages.extract(dataset, config), "extract", config, dataset)

    def finetune(self, dataset: str, config: FinetuneSettings) -> StageResult:
        """Fine-tune an encoder on the items."""
        return self._once(lambda: self.stages.finetune(dataset, config), "finetune", config, dataset)

    def search(self, dataset: str, features: Sequence[str], config: SearchSettings) -> StageResult:
        """Choose one recommender's settings on validation."""
        names = (dataset, *features)
        return self._once(lambda: self.stages.search(dataset, features, config), "search", config, *names)

    def train(
        self, dataset: str, features: Sequence[str], config: RunSettings, search: str = ""
    ) -> StageResult:
        """Train and measure one recommender with one seed."""
        names = (dataset, search, *features)
        return self._once(
            lambda: self.stages.train(dataset, features, config, search=search), "train", config, *names
        )

    def keep_states(self, dataset: str, config: StatesConfig) -> StageResult:
        """Run the frozen part of an encoder once over all items."""
        return self._once(lambda: self.stages.keep_states(dataset, config), "keep-states", config, dataset)

    def train_jointly(self, dataset: str, features: Sequence[str], config: JointSettings) -> StageResult:
        """Train encoder and recommender together."""
        names = (dataset, *features)
        return self._once(
            lambda: self.stages.train_jointly(dataset, features, config), "train-jointly", config, *names
        )

    def measure(self, encoder: str, features: Sequence[str], device: DeviceChoice) -> StageResult:
        """Measure the recommender on the trained encoder's features."""
        names = (encoder, device, *features)
        return self._once(lambda: self.stages.measure(encoder, features, device), "measure", None, *names)

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index a run's items."""
        return self._once(lambda: self.stages.index(source, config), "index", config, source)

    def compare(self, runs: Sequence[str], config: ComparisonConfig) -> StageResult:
        """Compare all runs."""
        return self._once(lambda: self.stages.compare(runs, config), "compare", config, *runs)

    def _once(
        self, make: Callable[[], StageResult], stage: str, config: BaseModel | None, *names: str
    ) -> StageResult:
        asked = (stage, config.model_dump_json() if config is not None else "", *names)
        if asked not in self._known:
            result = make()
            self._known[asked] = result
            self.results.append(result)
            if self._done is not None:
                self._done(result)
        return self._known[asked]
