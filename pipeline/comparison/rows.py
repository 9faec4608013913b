"""Rows of a comparison: the runs of one model on one feature set, over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.records import NO_FEATURES, RunRecord
from recommenders.significance import Interval, mean_over_seeds, t_interval

Floor = Literal["", "popularity", "content ItemKNN", "random or shuffled features", "constant features"]

POPULARITY = "popularity"
CONTENT_KNN = "itemknn_content"
COSTS = (
    "train_seconds",
    "evaluate_seconds",
    "feature_seconds",
    "feature_bytes",
    "peak_memory_bytes",
    "search_trials",
    "search_seconds",
)


TOLD = frozenset({"search.method", "search.n_trials"})
"""What the words for a search say already."""


@dataclass(frozen=True)
class Spread:
    """One metric of one part of the split."""

    mean: float
    """Over seeds."""
    sd: float
    """Standard deviation over seeds; NaN for one seed."""
    over_seeds: Interval
    """Student's interval over seeds: what another seed would change."""
    over_users: Interval | None
    """Student's interval over users of their means over seeds: what other users would change. None for
    validation and for metrics that single users do not have, such as coverage."""


@dataclass(frozen=True, eq=False)
class Row:
    """One model on one feature set with one choice of settings."""

    model: str
    feature_set: str
    variant: str
    """Settings that tell this row from others of its model: ``dim=32``; empty where they do not differ."""
    settings: str
    """All settings as JSON."""
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    floor: Floor
    """Which kind of floor the row is; empty for none."""
    valid: Mapping[str, Spread]
    test: Mapping[str, Spread]
    costs: Mapping[str, float]
    """Means over seeds, the peak of memory; what no run recorded is missing. ``search_trials`` is how many
    settings were tried before these were chosen."""
    per_user: NDArray[np.float64] = field(repr=False)
    """(U,) the deciding metric of each user on test, seeds averaged."""

    @property
    def recommender(self) -> str:
        """The model, with its variant where it has several."""
        return f"{self.model} ({self.variant})" if self.variant else self.model

    @property
    def label(self) -> str:
        """Names the row: ``vbpr / tiny image+text``, or ``bpr`` for a model that reads no features."""
        reads = self.feature_set != NO_FEATURES
        return f"{self.recommender} / {self.feature_set}" if reads else self.recommender


def make_rows(records: Sequence[RunRecord], config: ComparisonConfig) -> list[Row]:
    """Group runs into rows, in reading order; the order of the records does not matter.

    Popularity comes first, then models that read no features, content ItemKNN, and the others; within a
    model the best on validation first and its controls last.
    """
    groups: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for run in sorted(records, key=lambda run: run.seed):
        groups[run.model, run.feature_set, run.settings_key()].append(run)
    variants = _variants([runs[0] for runs in groups.values()])
    rows = [_row(runs, variants[model, settings], config) for (model, _, settings), runs in groups.items()]
    return sorted(rows, key=lambda row: _place(row, config.metric))


def floor_of(model: str, feature_set: str) -> Floor:
    """Return which kind of floor a model on a feature set is, if any.

    A feature set is a control only if all of it is: ``random image, tiny text`` is not.
    """
    if model == POPULARITY:
        return "popularity"
    if feature_set != NO_FEATURES:
        encoders = {part.split(" ")[0].split(":")[0] for part in feature_set.split(", ")}
        if encoders <= {"random", "shuffled", "constant"}:
            return "constant features" if encoders == {"constant"} else "random or shuffled features"
    return "content ItemKNN" if model == CONTENT_KNN else ""


def is_control(row: Row) -> bool:
    """Whether the row's features mean nothing."""
    return row.floor in {"random or shuffled features", "constant features"}


def modalities(feature_set: str) -> frozenset[str]:
    """Return the modalities of a feature set: ``clip image, minilm text`` has image and text."""
    return frozenset(name for part in feature_set.split(", ") for name in part.split(" ")[-1].split("+"))


def best_on_validation(rows: Iterable[Row], metric: str) -> Row:
    """Return the row with the best validation figure; equal ones: no control before a control, then by name.

    The only place where a comparison chooses, and it does not look at the test part.
    """
    return min(rows, key=lambda row: (-row.valid[metric].mean, is_control(row), row.label))


def _row(runs: Sequence[RunRecord], variant: str, config: ComparisonConfig) -> Row:
    first = runs[0]
    per_user = {metric: _over_seeds(runs, metric) for metric in config.metrics}
    decisive = per_user[config.metric]
    assert decisive is not None  # noqa: S101 - check_comparable has refused runs without it
    return Row(
        model=first.model,
        feature_set=first.feature_set,
        variant=variant,
        settings=first.settings_key(),
        seeds=tuple(run.seed for run in runs),
        runs=tuple(run.label for run in runs),
        floor=floor_of(first.model, first.feature_set),
        valid={
            metric: _spread([run.valid[metric] for run in runs], None, config) for metric in config.metrics
        },
        test={
            metric: _spread([run.test[metric] for run in runs], per_user[metric], config)
            for metric in config.metrics
        },
        costs=_costs(runs),
        per_user=decisive,
    )


def _over_seeds(runs: Sequence[RunRecord], metric: str) -> NDArray[np.float64] | None:
    values = [run.user_values(metric) for run in runs]
    present = [of_users for of_users in values if of_users is not None]
    return mean_over_seeds(present) if len(present) == len(runs) else None


def _spread(
    per_seed: Sequence[float], per_user: NDArray[np.float64] | None, config: ComparisonConfig
) -> Spread:
    over_seeds = t_interval(per_seed, level=config.level)
    return Spread(
        mean=over_seeds.mean,
        sd=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else float("nan"),
        over_seeds=over_seeds,
        over_users=None if per_user is None else t_interval(per_user, level=config.level),
    )


def _costs(runs: Sequence[RunRecord]) -> dict[str, float]:
    costs = {}
    for name in COSTS:
        values = [run.facts[name] for run in runs if name in run.facts]
        if values:
            costs[name] = max(values) if name == "peak_memory_bytes" else sum(values) / len(values)
    return costs


def _variants(runs: Sequence[RunRecord]) -> dict[tuple[str, str], str]:
    """Return, by model and settings, what tells a model's settings from its other ones."""
    by_model: dict[str, dict[str, dict[str, JsonValue]]] = defaultdict(dict)
    for run in runs:
        by_model[run.model][run.settings_key()] = _leaves(run.settings)
    named = {}
    for model, choices in by_model.items():
        for key, leaves in choices.items():
            # Settings that were searched hold no value, so that they are told from others of their kind.
            alike = [other for other in choices.values() if _is_searched(other) == _is_searched(leaves)]
            words = [f"{name}={leaves.get(name, '-')}" for name in _differing(alike)]
            if _is_searched(leaves) and len(choices) > 1:
                words.insert(0, f"searched, {leaves['search.method']} of {leaves['search.n_trials']}")
            named[model, key] = ", ".join(words)
    return named


def _is_searched(leaves: Mapping[str, JsonValue]) -> bool:
    return "search.method" in leaves


def _differing(choices: Sequence[Mapping[str, JsonValue]]) -> list[str]:
    """Return the names of settings that are not the same in all choices, but those told in words."""
    names = sorted({name for leaves in choices for name in leaves} - TOLD)
    return [name for name in names if len({json.dumps(leaves.get(name)) for leaves in choices}) > 1]


def _leaves(settings: Mapping[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    """Return nested settings under dotted names."""
    leaves: dict[str, JsonValue] = {}
    for name, value in settings.items():
        leaves |= (
            _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        )
    return leaves


def _place(row: Row, metric: str) -> tuple[int, str, bool, float, str]:
    if row.model == POPULARITY:
        group = 0
    elif row.feature_set == NO_FEATURES:
        group = 1
    else:
        group = 2 if row.model == CONTENT_KNN else 3
    return group, row.model, is_control(row), -row.valid[metric].mean, row.label
