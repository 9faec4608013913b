"""What a comparison knows of a run, and which runs may stand in one table."""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import JsonValue

from pipeline.comparison.config import ComparisonConfig
from pipeline.errors import ConfigError

NO_FEATURES = "-"
"""Feature set of a model that reads none."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One finished run: one model on one feature set with one seed."""

    label: str
    """Names the run in messages, such as its artefact's folder."""
    model: str
    feature_set: str
    """Such as ``tiny image+text``; ``-`` for a model that reads none."""
    seed: int
    dataset: str
    """Key of the dataset artefact."""
    split_fingerprint: str
    settings: Mapping[str, JsonValue]
    """All that shapes the run but its seed: the model's settings, training, how features are read."""
    valid: Mapping[str, float]
    """Metric -> mean over users of the validation part."""
    test: Mapping[str, float]
    per_user: pl.DataFrame
    """``user_row`` and a column for each metric of a user, of the test part."""
    evaluation: Mapping[str, JsonValue] = field(default_factory=dict)
    """How it was measured, as far as that changes a figure (block sizes do not)."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Costs: ``train_seconds``, ``evaluate_seconds``, ``feature_seconds``, ``feature_bytes``,
    ``peak_memory_bytes``, ``search_trials``, ``search_seconds``; what is missing shows as missing."""

    def users(self) -> NDArray[np.int64]:
        """Return (U,) rows of the users measured, ascending."""
        return self.per_user["user_row"].sort().cast(pl.Int64).to_numpy()

    def user_values(self, metric: str) -> NDArray[np.float64] | None:
        """Return (U,) a metric of each user, by ascending user row; None for one that users do not have."""
        if metric not in self.per_user.columns:
            return None
        return self.per_user.sort("user_row")[metric].cast(pl.Float64).to_numpy()

    def settings_key(self) -> str:
        """Equal for runs with equal settings."""
        return json.dumps(self.settings, sort_keys=True)


def check_comparable(records: Sequence[RunRecord], config: ComparisonConfig) -> None:
    """Refuse runs whose figures do not belong side by side.

    Raises:
        ConfigError: no runs; several datasets, splits, ways of measuring or sets of users; one seed twice in
            a row; a metric that a run was not measured by; figures that contradict their users'.
    """
    if not records:
        raise ConfigError("There are no runs to compare; train at least one recommender first.")
    _refuse_different(records, lambda run: run.dataset, "datasets")
    _refuse_different(records, lambda run: run.split_fingerprint, "splits")
    _refuse_different(records, lambda run: json.dumps(run.evaluation, sort_keys=True), "ways of measuring")
    _refuse_twins(records)
    for run in records:
        _check_metrics(run, config)
    first = records[0].users()
    for run in records[1:]:
        if not np.array_equal(run.users(), first):
            raise ConfigError(
                f"{run.label} was measured on {len(run.per_user)} users and {records[0].label} on "
                f"{len(first)}, or on others; paired tests need the same users. Train them again."
            )


def _refuse_different(records: Sequence[RunRecord], of: Callable[[RunRecord], str], what: str) -> None:
    labels: dict[str, list[str]] = defaultdict(list)
    for run in records:
        labels[of(run)].append(run.label)
    if len(labels) > 1:
        lines = [f"  {value[:60]}: {_some(runs)}" for value, runs in labels.items()]
        raise ConfigError(
            f"The runs come from {len(labels)} {what}, and figures of different {what} say nothing about "
            "each other:\n" + "\n".join(lines) + "\nCompare each group by itself."
        )


def _some(labels: Sequence[str], most: int = 4) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def _refuse_twins(records: Sequence[RunRecord]) -> None:
    seen: dict[tuple[str, str, str, int], str] = {}
    for run in records:
        key = (run.model, run.feature_set, run.settings_key(), run.seed)
        if key in seen:
            raise ConfigError(
                f"{seen[key]} and {run.label} are both {run.model} on {run.feature_set} with seed {run.seed} "
                "and equal settings; a run counts once. Leave one of them out."
            )
        seen[key] = run.label


def _check_metrics(run: RunRecord, config: ComparisonConfig) -> None:
    for metric in config.metrics:
        if metric not in run.valid or metric not in run.test:
            known = sorted(set(run.valid) & set(run.test))
            near = difflib.get_close_matches(metric, known, n=3) or known
            raise ConfigError(
                f"{run.label} was not measured by {metric!r}; it has {', '.join(near) or 'nothing'}. "
                "Name one of these in comparison.metric and comparison.more_metrics, measure at that k, or "
                "train the run again (--force) if it is from before the metric."
            )
    values = run.user_values(config.metric)
    if values is None:
        raise ConfigError(
            f"{run.label} has no {config.metric!r} of each user, which paired tests need; choose a metric of "
            f"users: {', '.join(column for column in run.per_user.columns if column != 'user_row')}."
        )
    if len(np.unique(run.users())) != len(values) or not np.isfinite(values).all():
        raise ConfigError(
            f"{run.label} has users twice or without a number in {config.metric!r}; train it again."
        )
    if abs(float(values.mean()) - run.test[config.metric]) > 1e-6:
        raise ConfigError(
            f"{run.label} says {config.metric} is {run.test[config.metric]:.6f} on test, but its users' mean "
            f"is {float(values.mean()):.6f}; its files do not belong together. Train it again."
        )
