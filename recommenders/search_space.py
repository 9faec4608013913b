"""What a search tries: its budget and method, and the ranges of a model's settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from recommenders.errors import SearchError
from recommenders.models.registry import Setting, model_config, model_entry
from recommenders.ranges import Between, Range
from recommenders.training import TrainingConfig

TRAINING = "training."
"""Before the name of a setting of training, such as ``training.learning_rate``; others are the model's."""
_NOT_SEARCHED = {"monitor", "check_memory"}
"""Settings of training that choose no model."""
GRID_POINTS = 5
"""Values that a grid takes of a range without a list."""

Space = dict[str, Range]
"""Setting -> what it may be, by name."""
Choice = dict[str, Setting]
"""Setting -> its value, by name: one point of a space."""


class SearchConfig(BaseModel, frozen=True, extra="forbid"):
    """How settings are searched; the same for every model, so that all get the same budget."""

    method: Literal["grid", "random", "tpe"] = Field(
        "tpe",
        description="grid: every point, in random order; random: points drawn at random; tpe: drawn where "
        "earlier points did well (tree-structured Parzen estimators).",
    )
    n_trials: PositiveInt = Field(
        20, description="Settings tried of each model and feature set; fewer where there are no more."
    )
    pruning: Literal["none", "median", "halving"] = Field(
        "median",
        description="Which trials end early: none; those below the median of the finished trials at the same "
        "epoch; or all but the best third each time the epochs triple (successive halving).",
    )
    warmup_epochs: NonNegativeInt = Field(10, description="Epochs before a trial may be ended early.")
    warmup_trials: PositiveInt = Field(
        4, description="Finished trials before `median` ends others, as there is no median yet."
    )
    time_budget_s: NonNegativeFloat = Field(
        0.0,
        description="Seconds of trials, summed over workers, after which no further one begins; 0: no limit. "
        "With a limit the choice depends on the machine.",
    )
    seed: NonNegativeInt = Field(0, description="Of the points drawn; training keeps its own seed.")
    ranges: dict[str, dict[str, Range]] = Field(
        default_factory=dict,
        description="Model -> setting -> a list of values or {low, high, log}, instead of the published "
        "range; `training.learning_rate` and the like are settings of training. One value fixes a setting.",
    )

    @field_validator("ranges", mode="before")
    @classmethod
    def _dotted(cls, raw: object) -> object:
        """Take ``training: {learning_rate: ...}`` for ``training.learning_rate: ...``."""
        if not isinstance(raw, Mapping):
            return raw
        return {
            model: _flat(ranges) if isinstance(ranges, Mapping) else ranges for model, ranges in raw.items()
        }

    @field_validator("ranges")
    @classmethod
    def _known(cls, ranges: dict[str, dict[str, Range]]) -> dict[str, dict[str, Range]]:
        for model, own in ranges.items():
            for name, values in own.items():
                check_range(model, name, values)  # raises for what does not exist or cannot be
        return ranges


def _flat(ranges: Mapping[Any, Any]) -> dict[Any, Any]:
    section = TRAINING.removesuffix(".")
    inner = ranges.get(section)
    if not isinstance(inner, Mapping):
        return dict(ranges)
    rest = {name: values for name, values in ranges.items() if name != section}
    return rest | {f"{TRAINING}{name}": values for name, values in inner.items()}


def check_range(model: str, name: str, values: Range) -> None:
    """Refuse a range of a setting that does not exist, or with a value that it cannot take.

    Raises:
        RecommenderError: There is no such model; the message lists what exists.
        SearchError: The setting or the range is wrong.
    """
    where = f"search.ranges.{model}.{name}"
    fields = model_entry(model).config.model_fields
    of_training = name.startswith(TRAINING)
    of_all = [f"{TRAINING}{field}" for field in TrainingConfig.model_fields if field not in _NOT_SEARCHED]
    known = [*fields, *of_all]
    if name == f"{TRAINING}monitor":
        raise SearchError(f"{where}: choices are made by the monitor, so it cannot be one; leave it out.")
    if name not in known:
        raise SearchError(f"{where}: {model} has no such setting; expected one of {', '.join(known)}.")
    tried: tuple[Any, ...] = (values.low, values.high) if isinstance(values, Between) else values
    if not tried:
        raise SearchError(f"{where} has no value; list one or more, or leave it out.")
    for value in tried:
        try:
            if of_training:
                TrainingConfig.model_validate({name.removeprefix(TRAINING): value})
            else:
                model_entry(model).config.model_validate({name: value})
        except ValidationError as error:
            raise SearchError(f"{where} holds {value!r}: {error.errors()[0]['msg']}.") from error


def search_space(model: str, config: SearchConfig, fixed: Mapping[str, Setting] | None = None) -> Space:
    """Return what is searched of a model: its published ranges, those of the configuration instead, by name.

    Args:
        model: Name of the model.
        config: Its ``ranges`` of this model count.
        fixed: Settings that the user has decided on; they are not searched.

    Raises:
        SearchError: A setting is both decided on and given a range.
    """
    own = config.ranges.get(model, {})
    decided = fixed or {}
    for name in own:
        if name in decided:
            raise SearchError(
                f"{model}: {name} is set to {decided[name]!r}, and search.ranges gives it a range; drop one."
            )
    ranges = {**model_entry(model).search, **own}
    return {name: ranges[name] for name in sorted(ranges) if name not in decided}


def grid_of(space: Space) -> dict[str, tuple[Setting, ...]]:
    """Return the values that a grid takes of each range, each once."""
    spread = {
        name: values.spread(GRID_POINTS) if isinstance(values, Between) else values
        for name, values in space.items()
    }
    return {name: tuple(dict.fromkeys(values)) for name, values in spread.items()}


def n_points(space: Space, config: SearchConfig) -> int | None:
    """Return how many different points there are to try; None where they cannot be counted."""
    if config.method != "grid" and any(
        isinstance(values, Between) and not values.is_whole for values in space.values()
    ):
        return None
    counts = (
        int(values.high - values.low) + 1
        if isinstance(values, Between) and config.method != "grid"
        else len(grid_of({name: values})[name])
        for name, values in space.items()
    )
    return math.prod(counts)


def all_points(space: Space) -> list[Choice]:
    """Return every point of the grid, the last setting changing first."""
    grid = grid_of(space)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_choice(
    model: str, settings: Mapping[str, Setting], training: TrainingConfig, choice: Mapping[str, Setting]
) -> tuple[dict[str, Setting], TrainingConfig]:
    """Return the model's settings and those of training with a choice put in.

    Raises:
        RecommenderError: The values do not go together.
    """
    chosen = {
        **settings,
        **{name: value for name, value in choice.items() if not name.startswith(TRAINING)},
    }
    model_config(model, chosen)
    of_training = {
        name.removeprefix(TRAINING): value for name, value in choice.items() if name.startswith(TRAINING)
    }
    return chosen, TrainingConfig.model_validate({**training.model_dump(), **of_training})
