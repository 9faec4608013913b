"""What a study of paradigms compares, and what of it cannot be, said before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from features.catalogue import TextConfig
from features.encoders.base import EncoderInfo
from features.extraction import ExtractionConfig
from features.finetuning.config import FinetuningConfig
from features.finetuning.objectives import needed_modality
from features.live.building import LiveConfig
from features.tuning.modes import TuningConfig
from features.tuning.side import SideConfig
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import FeatureSetConfig, RecommenderConfig, RunConfig, RunSearchConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.device import DeviceChoice
from pipeline.errors import ConfigError
from pipeline.reading import ReadingConfig
from pipeline.stages.extract_features import CONTROLS, GIVEN, encoder_label
from pipeline.stages.finetune_encoder import finetuned_name
from pipeline.stages.train_jointly import joint_label
from recommenders.evaluation import EvaluationConfig
from recommenders.joint import JointConfig
from recommenders.models.registry import MODELS
from recommenders.training import TrainingConfig

Paradigm = Literal["specific", "pretrained", "finetuned", "joint"]
Describe = Callable[[str], EncoderInfo]


class ParadigmsConfig(BaseModel, frozen=True, extra="forbid"):
    """One dataset, encoders and recommenders, and the ways of bringing them together that are compared."""

    name: str = Field("paradigms", description="Name under which the comparison is kept in the store.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    extraction: ExtractionConfig = Field(default_factory=ExtractionConfig)
    modalities: tuple[Literal["image", "text"], ...] = Field(
        ("image", "text"), min_length=1, description="What every recommender reads of an item."
    )
    specific: tuple[FeatureSetConfig, ...] = Field(
        (),
        description="Encoders of one modality each, frozen, such as {image: timm/resnet50, text: tfidf}; "
        "each entry has every one of the modalities.",
    )
    encoders: tuple[str, ...] = Field(
        ("tiny",),
        min_length=1,
        description="Encoders of all the modalities, each taken as it is, fine-tuned and trained jointly.",
    )
    recommenders: tuple[RecommenderConfig, ...] = Field(
        (RecommenderConfig(model="vbpr"),),
        description="Those that read features go through all paradigms; others get one row.",
    )
    paradigms: tuple[Paradigm, ...] = Field(
        ("specific", "pretrained", "finetuned", "joint"),
        description="What is compared; pretrained has to be there, as all else is tested against it.",
    )
    finetuning: FinetuningConfig = Field(default_factory=FinetuningConfig)
    finetune_per_seed: bool = Field(
        True, description="Whether an encoder is fine-tuned once a seed; false: once, with the first seed."
    )
    tuning: TuningConfig = Field(
        default_factory=TuningConfig, description="What of an encoder joint training trains."
    )
    side: SideConfig = Field(
        default_factory=SideConfig, description="The networks of `trained: side`, beside a frozen encoder."
    )
    trained: Literal["encoder", "side"] = Field(
        "encoder", description="What joint training trains: the encoder, or networks on its kept states."
    )
    live: LiveConfig = Field(default_factory=LiveConfig)
    joint: JointConfig = Field(default_factory=JointConfig)
    processes: PositiveInt = Field(
        1, description="Processes that share the encoding in joint training; with GPUs one each."
    )
    controls: bool = Field(
        True,
        description="Add what a comparison needs to be called controlled: random and shuffled features for "
        "every recommender, popularity, and content ItemKNN.",
    )
    reading: ReadingConfig = Field(default_factory=ReadingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    search: RunSearchConfig = Field(default_factory=RunSearchConfig)
    seeds: tuple[NonNegativeInt, ...] = Field(
        (0, 1, 2), min_length=1, description="One run of every row a seed."
    )
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")
    comparison: ComparisonConfig = Field(default_factory=ComparisonConfig)

    @property
    def readers(self) -> tuple[RecommenderConfig, ...]:
        """The recommenders that read features."""
        return tuple(one for one in self.recommenders if one.reads_features)

    def run_config(self) -> RunConfig:
        """Return all that a study shares with an ordinary run."""
        shared = [name for name in RunConfig.model_fields if name in ParadigmsConfig.model_fields]
        return RunConfig.model_validate({name: getattr(self, name) for name in shared})

    @model_validator(mode="after")
    def _as_a_run(self) -> ParadigmsConfig:
        """Refuse what an ordinary run would refuse."""
        try:
            self.run_config()
        except ValidationError as error:
            problems = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from error
        return self

    @model_validator(mode="after")
    def _possible(self) -> ParadigmsConfig:
        """Refuse what could only fail after hours."""
        for problem in (*_twice(self), *_impossible(self)):
            raise ValueError(problem)
        if "joint" in self.paradigms:
            for problem in _not_jointly(self):
                raise ValueError(problem)
        return self


def _twice(config: ParadigmsConfig) -> Iterator[str]:
    lists: dict[str, Sequence[object]] = {
        "modalities": config.modalities,
        "specific": [str(one.encoders()) for one in config.specific],
        "encoders": config.encoders,
        "recommenders": [one.model_dump_json() for one in config.recommenders],
        "paradigms": config.paradigms,
        "seeds": config.seeds,
    }
    for name, values in lists.items():
        for value, times in Counter(values).items():
            if times > 1:
                yield f"{name} lists {value} {times} times; list it once"


def _impossible(config: ParadigmsConfig) -> Iterator[str]:
    if "pretrained" not in config.paradigms:
        yield (
            f"paradigms is {', '.join(config.paradigms) or 'empty'}, without pretrained, which every "
            "difference is against; add it"
        )
    if "specific" in config.paradigms and "paradigms" in config.model_fields_set and not config.specific:
        yield (
            "paradigms names specific, and specific lists no encoders; give some, such as "
            "specific: [{image: timm/resnet50, text: tfidf}]"
        )
    if not config.readers:
        models = ", ".join(one.model for one in config.recommenders) or "there are none"
        yield (
            f"none of the recommenders reads features ({models}), so that no paradigm could differ from "
            "another; name one that does, such as vbpr"
        )
    for one in config.specific:
        has = list(dict.fromkeys(modality for modality, _ in one.encoders()))
        if set(has) != set(config.modalities):
            yield (
                f"specific lists encoders of {' and '.join(has)}, and modalities are "
                f"{' and '.join(config.modalities)}; rows differ by their encoders alone only where all "
                "read the same, so give one encoder for each"
            )
    for encoder in (*config.encoders, *(name for one in config.specific for _, name in one.encoders())):
        if encoder.startswith(CONTROLS):
            yield f"{encoder} encodes nothing; leave it out, `controls: true` adds such features by itself"
        if encoder == GIVEN and encoder in config.encoders:
            yield (
                "encoders lists given, which are vectors without an encoder: nothing could be trained; "
                "list it below specific"
            )


def _not_jointly(config: ParadigmsConfig) -> Iterator[str]:
    without = "or leave joint out of paradigms"
    for one in config.readers:
        if MODELS[one.model].model.scoring == "neighbours":
            yield (
                f"{one.model} has nothing to train, so that it cannot be trained jointly with an encoder; "
                f"leave it out (`controls: true` adds content ItemKNN as a floor), {without}"
            )
    if config.reading.fuse != "none":
        yield (
            f"reading.fuse is {config.reading.fuse!r}, and in joint training each modality stays a table of "
            f"its own; set it to none, {without}"
        )
    if config.joint.negative_pool and config.training.negatives != "uniform":
        yield (
            f"joint.negative_pool is {config.joint.negative_pool} and training.negatives is "
            f"{config.training.negatives!r}; a pool is drawn uniformly: set the pool to 0, {without}"
        )
    if config.training.amp != "off" or config.training.compile:
        yield (
            "training.amp and training.compile are for recommenders on constant features; leave both at "
            f"their defaults, {without}"
        )
    if config.training.epochs <= config.joint.warmup_epochs:
        yield (
            f"training.epochs is {config.training.epochs}, of which joint.warmup_epochs are "
            f"{config.joint.warmup_epochs}, so that nothing would be trained jointly; give more epochs, "
            f"{without}"
        )


def check_encoders(config: ParadigmsConfig, describe: Describe) -> None:
    """Refuse encoders that cannot go through the paradigms asked for, before anything is encoded.

    Args:
        config: The study.
        describe: Says what a specification is, that of an encoder artefact included.

    Raises:
        ConfigError: One without a modality, without parameters to train, or two of the same name.
        EncoderError: One that cannot be what its specification says.
    """
    trained = [name for name in ("finetuned", "joint") if name in config.paradigms]
    objectives = config.finetuning.objectives
    needed = needed_modality(objectives)
    for spec in config.encoders:
        info = describe(spec)
        for modality in config.modalities:
            _check_modality(spec, info, modality, "list it below specific beside one that has it")
        if trained and info.n_parameters == 0:
            raise ConfigError(
                f"{spec} has no parameters, so that it cannot be {' or '.join(trained)}; list it below "
                "specific, or take another encoder."
            )
        if "finetuned" in trained:
            for modality in ("image", "text") if needed == "fused" else (needed,):
                hint = "set finetuning.objectives.image_text to 0 and co_purchase to 1"
                _check_modality(spec, info, modality, hint)
    for name, spec in (pair for one in config.specific for pair in one.encoders()):
        if spec != GIVEN:
            _check_modality(spec, describe(spec), name, "take another one")
    _check_names(config, describe)


def _check_modality(spec: str, info: EncoderInfo, modality: str, hint: str) -> None:
    if modality not in info.modalities:
        raise ConfigError(
            f"{spec} encodes {' and '.join(info.modalities)}, not {modality}, which it is asked for; {hint}."
        )


def _check_names(config: ParadigmsConfig, describe: Describe) -> None:
    """Refuse encoders whose rows a comparison could not tell from each other's, as it knows them by name."""
    owners: dict[str, str] = {}
    for spec in config.encoders:
        label = encoder_label(spec, describe(spec))
        names = [(label, f"{spec} as it is")]
        if "finetuned" in config.paradigms:
            names.append((finetuned_name(label), f"{spec} fine-tuned"))
        if "joint" in config.paradigms:
            models = dict.fromkeys(one.model for one in config.readers)
            names += [(joint_label(label, model), f"{spec} trained with {model}") for model in models]
        for name, owner in names:
            if name in owners:
                raise ConfigError(
                    f"{owners[name]} and {owner} would both be called {name}, and the rows could not be told "
                    "apart; leave one of them out."
                )
            owners[name] = owner
