"""The configuration of a whole two-stage run: YAML -> ``RunConfig``, checked once, at the door."""

from __future__ import annotations

import difflib
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from features.catalogue import TextConfig
from features.extraction import ExtractionConfig
from features.indexing import IndexConfig
from pipeline.comparison.config import ComparisonConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.device import DeviceChoice
from pipeline.errors import ConfigError
from pipeline.reading import ReadingConfig
from recommenders.beyond_accuracy import list_metric_names
from recommenders.evaluation import EvaluationConfig
from recommenders.metrics import metric_names
from recommenders.models.registry import MODELS, Setting, model_config
from recommenders.search_space import SearchConfig, search_space
from recommenders.training import TrainingConfig

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class FeatureSetConfig(BaseModel, frozen=True, extra="forbid"):
    """What a recommender reads: the encoders of each modality, none where a modality is left out."""

    image: str | tuple[str, ...] = Field(
        "",
        description="Encoder of the pictures, as in `tandem encoders`, or several; empty: no pictures.",
    )
    text: str | tuple[str, ...] = Field("", description="Encoder of the texts, or several; empty: no texts.")
    fused: str | tuple[str, ...] = Field(
        "", description="Encoder of picture and text together, or several; empty: none."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> FeatureSetConfig:
        if not self.encoders():
            raise ValueError("a feature set needs at least one of image, text, fused")
        for modality, encoder in self.encoders():
            if not encoder:
                raise ValueError(f"{modality} lists an encoder without a name; name it, or leave it out")
        for (modality, encoder), times in Counter(self.encoders()).items():
            if times > 1:
                raise ValueError(f"{modality} lists {encoder!r} {times} times; list each encoder once")
        return self

    def encoders(self) -> list[tuple[str, str]]:
        """Return each modality with an encoder of it, for the modalities it has."""
        every = {"image": self.image, "text": self.text, "fused": self.fused}
        lists = {modality: _listed(encoders) for modality, encoders in every.items()}
        return [(modality, encoder) for modality, encoders in lists.items() for encoder in encoders]


def _listed(encoders: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(encoders, str):
        return (encoders,) if encoders else ()
    return encoders


class RecommenderConfig(BaseModel, frozen=True, extra="forbid"):
    """A recommender by name, with what differs from its defaults."""

    model: str = Field("vbpr", description="Name of the recommender; `tandem recommenders` lists them.")
    settings: dict[str, Setting] = Field(
        default_factory=dict, description="Settings of this recommender that differ from its defaults."
    )

    @model_validator(mode="after")
    def _known(self) -> RecommenderConfig:
        model_config(self.model, self.settings)  # raises for a name or a key that does not exist
        return self

    @property
    def reads_features(self) -> bool:
        """Whether this recommender reads item features at all."""
        return MODELS[self.model].model.needs_features


class RunSearchConfig(SearchConfig, frozen=True, extra="forbid"):
    """Whether and how settings are searched before recommenders are trained; one budget for all of them."""

    enabled: bool = Field(
        False,
        description="Search the settings of every recommender on every feature set, on validation, with the "
        "first seed, then train with all seeds; true where any other setting of the search is given.",
    )

    @model_validator(mode="before")
    @classmethod
    def _enabled_by_use(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and raw and "enabled" not in raw:
            return {**raw, "enabled": True}
        return raw

    def plain(self) -> SearchConfig:
        """Return how settings are searched, where they are."""
        return SearchConfig.model_validate(self.model_dump(exclude={"enabled"}))


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """A dataset, the feature sets to compare, and the recommenders that read them, over several seeds."""

    name: str = Field("two-stage", description="Name under which the comparison is kept in the store.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    extraction: ExtractionConfig = Field(default_factory=ExtractionConfig)
    feature_sets: tuple[FeatureSetConfig, ...] = Field(
        (FeatureSetConfig(image="tiny", text="tiny"),), description="What the recommenders read, compared."
    )
    index: IndexConfig = Field(default_factory=IndexConfig)
    recommenders: tuple[RecommenderConfig, ...] = Field(
        (RecommenderConfig(model="popularity"), RecommenderConfig(model="vbpr")),
        description="The recommenders to train; those that read features are trained on each feature set.",
    )
    reading: ReadingConfig = Field(default_factory=ReadingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    search: RunSearchConfig = Field(default_factory=RunSearchConfig)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="One run of each recommender a seed.")
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")
    comparison: ComparisonConfig = Field(default_factory=ComparisonConfig)

    @model_validator(mode="after")
    def _searchable(self) -> RunConfig:
        """Refuse a range for a setting that is given, before anything is computed."""
        for recommender in self.recommenders if self.search.enabled else ():
            search_space(recommender.model, self.search, recommender.settings)
        return self

    @model_validator(mode="after")
    def _measured(self) -> RunConfig:
        """Refuse a metric that nobody will measure before hours of training, not after them."""
        of_users = metric_names(self.evaluation.ks)
        of_lists = [name for name in list_metric_names(self.evaluation.ks) if not name.startswith("popreo")]
        known = [
            *of_users,
            *(f"coverage@{k}" for k in self.evaluation.ks),
            *of_lists,
        ]  # popreo may be undefined
        wanted = {
            "training.monitor": ([self.training.monitor], of_users),
            "comparison.metric": ([self.comparison.metric], of_users),
            "comparison.more_metrics": (list(self.comparison.more_metrics), known),
        }
        for place, (metrics, allowed) in wanted.items():
            for metric in metrics:
                if metric not in allowed:
                    near = difflib.get_close_matches(metric, allowed, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(allowed)}."
                    raise ValueError(
                        f"{place}: {metric!r} is not measured at evaluation.ks {self.evaluation.ks}; {hint}"
                    )
        return self


def load_config(path: Path, config_type: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file and check it.

    Args:
        path: The YAML file.
        config_type: What it must describe.
        overrides: ``dotted.key=value`` changes, the value in YAML.

    Raises:
        ConfigError: No such file, not YAML, or a key or value that ``config_type`` does not know.
    """
    return parse_config(with_overrides(load_yaml(path), overrides), config_type, source=str(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values, to be checked.

    Raises:
        ConfigError: No such file, or not YAML.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no configuration file {path}; give the path of a YAML file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a {type(raw).__name__}; expected keys and values such as `seeds: [0, 1, 2]`."
        )
    return raw


def with_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``dotted.key=value`` changes to a nested mapping; values are read as YAML.

    Raises:
        ConfigError: A change without ``=``, or below something that holds no keys.
    """
    changed = _deep_copy(raw)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"--set takes key=value; got {override!r}. Example: --set training.epochs=20")
        *parents, last = dotted.split(".")
        place = changed
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override}: {parent!r} holds no keys of its own.")
        try:
            place[last] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: {text!r} is not a YAML value.") from error
    return changed


def parse_config(
    raw: Mapping[str, Any], config_type: type[ConfigT], source: str = "configuration"
) -> ConfigT:
    """Check a nested mapping against a configuration type.

    Raises:
        ConfigError: A line for each key or value that is not right, with the near match of a misspelt key.
    """
    try:
        return config_type.model_validate(dict(raw))
    except ValidationError as error:
        lines = [_explain(config_type, problem) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _deep_copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in raw.items()}


def _explain(config_type: type[BaseModel], problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(config_type, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
        return f"{place}: unknown key; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{place}: {message} (got {problem['input']!r:.80})"


def _fields_at(config_type: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that the configuration type allows at a place of the file."""
    here: Any = config_type
    for part in location:
        if isinstance(part, int) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        annotation = here.model_fields[part].annotation
        inner = [
            arg for arg in typing.get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)
        ]
        here = inner[0] if inner else annotation
    return sorted(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
