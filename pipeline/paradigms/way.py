"""The whole study, stage after stage: what is shared is made once, and every row is a run like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from features.encoders.base import EncoderInfo
from pipeline.config import FeatureSetConfig, RecommenderConfig
from pipeline.encoder_specs import resolve_encoder, stored_spec
from pipeline.joint_way import JointStages, JointWayConfig, PlainJointStages, run_joint
from pipeline.paradigms.config import Paradigm, ParadigmsConfig, check_encoders
from pipeline.paradigms.once import OnceStages
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.finetune_encoder import FinetuneSettings, finetune_encoder
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import RunSettings, best_choice
from pipeline.two_stage import PlainStages, Stages, run_settings, search_settings
from recommenders.search_space import with_choice

if TYPE_CHECKING:
    from pipeline.store import Artefact

Kind = Literal[Paradigm, "control", "floor"]


class ParadigmStages(Stages, JointStages, Protocol):
    """The stages, however they are run: as plain functions here, as Prefect subflows in ``flows``."""

    def describe(self, encoder: str) -> EncoderInfo:
        """Say what an encoder is."""
        ...

    def finetune(self, dataset: str, config: FinetuneSettings) -> StageResult:
        """Fine-tune an encoder on the items."""
        ...


@dataclass(frozen=True)
class PlainParadigmStages(PlainStages, PlainJointStages):
    """The stages called one after the other in this process."""

    def describe(self, encoder: str) -> EncoderInfo:
        """Say what an encoder is."""
        return resolve_encoder(self.store, encoder).describe()

    def finetune(self, dataset: str, config: FinetuneSettings) -> StageResult:
        """Fine-tune an encoder on the items."""
        return finetune_encoder(self.store, dataset, config, reporter=self.reporter, force=self.force)


@dataclass(frozen=True)
class Features:
    """What a recommender reads, and what had to be made for it."""

    made: tuple[StageResult, ...] = ()
    """A feature artefact for each modality."""
    encoder: StageResult | None = None
    """The encoder behind them, where it was trained here."""
    before: tuple[StageResult, ...] = ()
    """The features that joint training started from."""
    states: tuple[StageResult, ...] = ()
    """States of what joint training left frozen."""

    @property
    def keys(self) -> list[str]:
        """Of the feature artefacts."""
        return [one.artefact.key for one in self.made]


@dataclass(frozen=True)
class SeedRun:
    """One run with all that it needed."""

    run: StageResult
    features: Features
    search: StageResult | None = None
    """The search behind its settings, if there was one."""


@dataclass(frozen=True)
class Contender:
    """A row of the table to be: one recommender with one encoder in one paradigm."""

    recommender: str
    """The model, with its place in the configuration where several are of one model."""
    encoder: str
    """As it is named in the configuration; "" for a recommender that reads no features."""
    kind: Kind
    runs: tuple[SeedRun, ...]
    """One a seed."""


@dataclass
class ParadigmsResult:
    """What a study made."""

    dataset: StageResult
    contenders: list[Contender] = field(default_factory=list)
    comparison: StageResult | None = None
    stages: list[StageResult] = field(default_factory=list)
    """Every stage's result, each once, in the order they ran."""


def run_paradigms(
    config: ParadigmsConfig, stages: ParadigmStages, done: Callable[[StageResult], None] | None = None
) -> ParadigmsResult:
    """Run a whole study; what the store holds already is reused, and nothing is asked for twice.

    Args:
        config: What is compared.
        stages: How a stage is run.
        done: Told of each stage's result as it comes.

    Raises:
        ConfigError, EncoderError: An encoder that cannot go through the paradigms, before anything is made.
    """
    check_encoders(config, stages.describe)
    once = OnceStages(stages, done)
    dataset = once.prepare(config.dataset)
    study = _Study(config, once, dataset.artefact)
    contenders = [*study.floors(), *(row for one in named_apart(config.readers) for row in study.rows(*one))]
    runs = [each.run.artefact.key for contender in contenders for each in contender.runs]
    compared = once.compare(runs, config.comparison)
    return ParadigmsResult(dataset, contenders, compared, once.results)


class _Study:
    """A configuration, its stages and its dataset, from which rows are made."""

    def __init__(self, config: ParadigmsConfig, stages: OnceStages, dataset: Artefact) -> None:
        self.config, self.stages, self.dataset = config, stages, dataset.key
        self.base = config.run_config()

    def floors(self) -> list[Contender]:
        """Recommenders that read no features; and, as a control, popularity and content ItemKNN."""
        floors = [one for one in self.config.recommenders if not one.reads_features]
        models = {one.model for one in self.config.recommenders}
        if self.config.controls and "popularity" not in models:
            floors = [RecommenderConfig(model="popularity"), *floors]
        nothing = [Features()] * len(self.config.seeds)
        rows = [Contender(name, "", "floor", self._train(one, nothing)) for name, one in named_apart(floors)]
        if self.config.controls and "itemknn_content" not in models:
            encoder = self.config.encoders[0]
            content = RecommenderConfig(model="itemknn_content")
            rows.append(
                Contender(content.model, encoder, "floor", self._train(content, self._as_it_is(encoder)))
            )
        return rows

    def rows(self, name: str, recommender: RecommenderConfig) -> list[Contender]:
        """All rows of one recommender that reads features: by encoder, its controls last."""
        config, wanted = self.config, self.config.paradigms
        rows = []
        for specific in config.specific if "specific" in wanted else ():
            runs = self._train(recommender, self._frozen(specific))
            rows.append(Contender(name, _label(specific), "specific", runs))
        for encoder in config.encoders:
            rows.append(
                Contender(name, encoder, "pretrained", self._train(recommender, self._as_it_is(encoder)))
            )
            if "finetuned" in wanted:
                tuned = self._train(recommender, self._finetuned(encoder))
                rows.append(Contender(name, encoder, "finetuned", tuned))
            if "joint" in wanted:
                rows.append(Contender(name, encoder, "joint", self._joint(recommender, encoder)))
        for label, features in self._controls() if config.controls else ():
            runs = self._train(recommender, self._frozen(features))
            rows.append(Contender(name, label, "control", runs))
        return rows

    def _controls(self) -> list[tuple[str, FeatureSetConfig]]:
        """Noise as wide as the first encoder's vectors, and its vectors dealt out to other items."""
        first = self.config.encoders[0]
        dims = {str(name): dim for name, dim in self.stages.describe(first).dims.items()}
        noise = {modality: f"random:{dims[modality]}" for modality in self.config.modalities}
        dealt = dict.fromkeys(self.config.modalities, f"shuffled:{first}")
        return [
            ("random", FeatureSetConfig.model_validate(noise)),
            (f"shuffled:{first}", FeatureSetConfig.model_validate(dealt)),
        ]

    def _extract(self, modality: str, encoder: str) -> StageResult:
        config = self.config
        what = {"encoder": encoder, "modality": modality, "text": config.text, "device": config.device}
        wanted = FeaturesConfig.model_validate({**what, "extraction": config.extraction})
        return self.stages.extract(self.dataset, wanted)

    def _frozen(self, features: FeatureSetConfig) -> list[Features]:
        """The same features for every seed."""
        made = tuple(self._extract(modality, encoder) for modality, encoder in features.encoders())
        return [Features(made)] * len(self.config.seeds)

    def _as_it_is(self, encoder: str) -> list[Features]:
        return self._frozen(FeatureSetConfig.model_validate(dict.fromkeys(self.config.modalities, encoder)))

    def _finetuned(self, encoder: str) -> list[Features]:
        """Features of the encoder as fine-tuned with each seed, or with the first for all of them."""
        config = self.config
        of_seeds = config.seeds if config.finetune_per_seed else config.seeds[:1] * len(config.seeds)
        found = []
        for seed in of_seeds:
            wanted = FinetuneSettings(
                encoder=encoder,
                text=config.text,
                finetuning=config.finetuning,
                seed=seed,
                device=config.device,
            )
            tuned = self.stages.finetune(self.dataset, wanted)
            spec = stored_spec(tuned.artefact)
            made = tuple(self._extract(modality, spec) for modality in config.modalities)
            found.append(Features(made, tuned))
        return found

    def _search(self, recommender: RecommenderConfig, features: Features) -> StageResult | None:
        wanted = search_settings(self.base, recommender)
        return None if wanted is None else self.stages.search(self.dataset, features.keys, wanted)

    def _train(self, recommender: RecommenderConfig, features: Sequence[Features]) -> tuple[SeedRun, ...]:
        """One run a seed, with settings searched on the features of the first seed.

        A run names its search only where that was on the run's own features. Where each seed has features of
        its own the choice is written into the settings, of all seeds alike, so that they stay one row.
        """
        found = self._search(recommender, features[0])
        shared = all(one.keys == features[0].keys for one in features)
        runs = []
        for seed, one in zip(self.config.seeds, features, strict=True):
            settings = run_settings(self.base, recommender, seed)
            if found is not None and shared:
                run = self.stages.train(self.dataset, one.keys, settings, search=found.artefact.key)
            else:
                run = self.stages.train(self.dataset, one.keys, _with_choice(settings, found))
            runs.append(SeedRun(run, one, found))
        return tuple(runs)

    def _joint(self, recommender: RecommenderConfig, encoder: str) -> tuple[SeedRun, ...]:
        """One joint training a seed, with the settings that were chosen on the encoder's frozen features."""
        config = self.config
        found = self._search(recommender, self._as_it_is(encoder)[0])
        runs = []
        for seed in config.seeds:
            settings = _with_choice(run_settings(self.base, recommender, seed), found)
            wanted = JointWayConfig(
                **{name: getattr(settings, name) for name in RunSettings.model_fields},
                encoder=encoder,
                modalities=config.modalities,
                text=config.text,
                extraction=config.extraction,
                tuning=config.tuning,
                side=config.side,
                trained=config.trained,
                live=config.live,
                joint=config.joint,
                processes=config.processes,
            )
            made = run_joint(wanted, self.stages, self.dataset)
            assert made.run is not None  # noqa: S101 - a finished run has one
            features = Features(tuple(made.features), made.encoder, tuple(made.start), tuple(made.states))
            runs.append(SeedRun(made.run, features, found))
        return tuple(runs)


def named_apart(recommenders: Sequence[RecommenderConfig]) -> list[tuple[str, RecommenderConfig]]:
    """Recommenders by a name that tells those of one model apart."""
    models = [one.model for one in recommenders]
    return [
        (f"{one.model} ({number})" if models.count(one.model) > 1 else one.model, one)
        for number, one in enumerate(recommenders, start=1)
    ]


def _with_choice(settings: RunSettings, found: StageResult | None) -> RunSettings:
    if found is None:
        return settings
    choice = best_choice(found.artefact)
    chosen, training = with_choice(settings.model, settings.settings, settings.training, choice)
    return settings.model_copy(update={"settings": chosen, "training": training})


def _label(features: FeatureSetConfig) -> str:
    """What a set of encoders is called: their specifications with what each encodes."""
    return ", ".join(f"{encoder} {modality}" for modality, encoder in features.encoders())
