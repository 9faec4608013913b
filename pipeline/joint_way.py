"""The whole second way: joint training, then the trained encoder's features, a measured run, an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from features.catalogue import TextConfig
from features.encoding import ExtractionConfig
from features.indexing import IndexConfig
from pipeline.encoder_specs import stored_spec
from pipeline.progress import SILENT, Reporter
from pipeline.stages.build_index import build_index
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.keep_states import StatesConfig, keep_encoder_states
from pipeline.stages.measure_joint import measure_joint
from pipeline.stages.result import StageResult
from pipeline.stages.train_jointly import JointSettings, states_wanted, train_encoder_jointly

if TYPE_CHECKING:
    from pipeline.device import DeviceChoice
    from pipeline.store import Store


class JointWayConfig(JointSettings, frozen=True, extra="forbid"):
    """Joint training of an encoder and a recommender, from a dataset to a measured run."""

    modalities: tuple[Literal["image", "text"], ...] = Field(
        ("image", "text"), min_length=1, description="What the encoder encodes, and learns to encode."
    )
    text: TextConfig = Field(default_factory=TextConfig)
    extraction: ExtractionConfig = Field(default_factory=ExtractionConfig)
    index: IndexConfig = Field(default_factory=IndexConfig)

    def training_alone(self) -> JointSettings:
        """Return the settings of the training alone."""
        names = JointSettings.model_fields
        return JointSettings.model_validate({name: getattr(self, name) for name in names})

    def extract(self, modality: str, encoder: str) -> FeaturesConfig:
        """Return how one modality is encoded."""
        what = {"encoder": encoder, "modality": modality, "text": self.text, "extraction": self.extraction}
        return FeaturesConfig.model_validate({**what, "device": self.device})


class JointStages(Protocol):
    """The stages, however they are run: as plain functions here, as Prefect subflows in ``flows``."""

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        ...

    def keep_states(self, dataset: str, config: StatesConfig) -> StageResult:
        """Run the frozen part of an encoder once over all items."""
        ...

    def train_jointly(self, dataset: str, features: Sequence[str], config: JointSettings) -> StageResult:
        """Train encoder and recommender together."""
        ...

    def measure(self, encoder: str, features: Sequence[str], device: DeviceChoice) -> StageResult:
        """Measure the recommender on the trained encoder's features."""
        ...

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index a feature artefact or a run's items."""
        ...


@dataclass(frozen=True)
class PlainJointStages:
    """The stages called one after the other in this process."""

    store: Store
    reporter: Reporter = SILENT
    force: bool = False

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        return extract_features(self.store, dataset, config, reporter=self.reporter, force=self.force)

    def keep_states(self, dataset: str, config: StatesConfig) -> StageResult:
        """Run the frozen part of an encoder once over all items."""
        return keep_encoder_states(self.store, dataset, config, reporter=self.reporter, force=self.force)

    def train_jointly(self, dataset: str, features: Sequence[str], config: JointSettings) -> StageResult:
        """Train encoder and recommender together."""
        return train_encoder_jointly(
            self.store, dataset, features, config, reporter=self.reporter, force=self.force
        )

    def measure(self, encoder: str, features: Sequence[str], device: DeviceChoice) -> StageResult:
        """Measure the recommender on the trained encoder's features."""
        return measure_joint(
            self.store, encoder, features, device=device, reporter=self.reporter, force=self.force
        )

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index a feature artefact or a run's items."""
        return build_index(self.store, source, config, reporter=self.reporter, force=self.force)


@dataclass
class JointResult:
    """Every stage's result, in the order they ran."""

    start: list[StageResult] = field(default_factory=list)
    """The features that training starts from."""
    states: list[StageResult] = field(default_factory=list)
    """What the frozen part of the encoder makes of all items, where a part is frozen."""
    encoder: StageResult | None = None
    features: list[StageResult] = field(default_factory=list)
    """The trained encoder's."""
    run: StageResult | None = None
    index: StageResult | None = None
    """Of the run's item embeddings."""

    def all(self) -> list[StageResult]:
        """Every stage's result."""
        single = [self.run, self.index]
        encoder = [self.encoder] if self.encoder else []
        return [*self.start, *self.states, *encoder, *self.features, *(stage for stage in single if stage)]


def run_joint(
    config: JointWayConfig,
    stages: JointStages,
    dataset: str,
    *,
    beside: Sequence[str] = (),
    done: Callable[[StageResult], None] | None = None,
) -> JointResult:
    """Train an encoder with a recommender, and leave both as every other stage's artefacts.

    Args:
        config: What to train how.
        stages: How a stage is run.
        dataset: Name, key or folder of a dataset artefact.
        beside: Feature artefacts that the recommender reads, too, and that stay as they are.
        done: Told of each stage's result as it comes.
    """

    def note(result: StageResult) -> StageResult:
        if done is not None:
            done(result)
        return result

    made = JointResult()
    for modality in config.modalities:
        made.start.append(note(stages.extract(dataset, config.extract(modality, config.encoder))))
    for modality in config.modalities:
        states = states_wanted(config, modality, config.text)
        if states is not None:
            made.states.append(note(stages.keep_states(dataset, states)))
    before = [stage.artefact.key for stage in made.start]
    made.encoder = note(stages.train_jointly(dataset, [*before, *beside], config.training_alone()))
    trained = made.encoder.artefact
    for modality in config.modalities:
        wanted = config.extract(modality, stored_spec(trained))
        made.features.append(note(stages.extract(dataset, wanted)))
    after = [stage.artefact.key for stage in made.features]
    made.run = note(stages.measure(trained.key, [*after, *beside], config.device))
    made.index = note(stages.index(made.run.artefact.key, config.index))
    return made
