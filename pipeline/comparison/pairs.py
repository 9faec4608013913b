"""Which rows are tested against which, and the tests."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.records import NO_FEATURES
from pipeline.comparison.rows import POPULARITY, Row, best_on_validation, is_control, modalities
from pipeline.errors import ConfigError
from recommenders.significance import PairedComparison, compare_paired, holm

BEST = "best feature set against another"
CONTROL = "feature set against its control"
POPULAR = "recommender against popularity"
REFERENCE = "row against the reference"


@dataclass(frozen=True)
class Pair:
    """One paired test on the test part; what is tested was chosen without looking at it."""

    a: Row
    b: Row
    question: str
    """Why these two."""
    result: PairedComparison
    """Of a against b, users paired, seeds averaged."""
    p_holm: float
    """Of the sign-flip test, adjusted for all tests of the table."""
    significant: bool


def tested_pairs(rows: Sequence[Row], config: ComparisonConfig) -> list[Pair]:
    """Test the pairs that :func:`choose_pairs` names; all of them are one family for Holm's correction.

    Each pair draws from its own stream, so that a row more or less does not change the other p-values.
    """
    chosen = list(choose_pairs(rows, config))
    results = [
        compare_paired(
            a.per_user,
            b.per_user,
            _stream(config.seed, a, b),
            n_permutations=config.n_permutations,
            n_resamples=config.n_resamples,
            level=config.level,
        )
        for a, b, _ in chosen
    ]
    adjusted = holm([result.sign_flip.p_value for result in results])
    return [
        Pair(a, b, question, result, float(p_holm), bool(p_holm < config.alpha))
        for (a, b, question), result, p_holm in zip(chosen, results, adjusted, strict=True)
    ]


def choose_pairs(rows: Sequence[Row], config: ComparisonConfig) -> Iterator[tuple[Row, Row, str]]:
    """Yield what is tested against what, each two rows once.

    With a reference, every other row against it. Otherwise:

    1. for each recommender, its best feature set on validation against each of its others;
    2. for each recommender, each feature set against its control of random or shuffled features: the
       strongest on validation, of the same modalities if there is one;
    3. every recommender against popularity, except where its features are a control.

    Raises:
        ConfigError: there is no row of the reference's name.
    """
    asked = _against_reference(rows, config) if config.reference else _automatic(rows, config)
    seen: set[frozenset[int]] = set()
    for a, b, question in asked:
        both = frozenset((id(a), id(b)))
        if a is not b and both not in seen:
            seen.add(both)
            yield a, b, question


def _against_reference(rows: Sequence[Row], config: ComparisonConfig) -> Iterator[tuple[Row, Row, str]]:
    labels = [row.label for row in rows]
    if config.reference not in labels:
        near = difflib.get_close_matches(config.reference, labels, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the rows are: {'; '.join(labels)}."
        raise ConfigError(f"comparison.reference is {config.reference!r}, which no row is called; {hint}")
    reference = rows[labels.index(config.reference)]
    for row in rows:
        yield row, reference, REFERENCE


def _automatic(rows: Sequence[Row], config: ComparisonConfig) -> Iterator[tuple[Row, Row, str]]:
    models = dict.fromkeys(row.model for row in rows if row.feature_set != NO_FEATURES)
    for model in models:
        own = [row for row in rows if row.model == model]
        best = best_on_validation(own, config.metric)
        for row in own:
            yield best, row, BEST
    for model in models:
        own = [row for row in rows if row.model == model]
        for row in own:
            control = control_of(row, own, config.metric)
            if control is not None and not is_control(row):
                yield row, control, CONTROL
    for popularity in (row for row in rows if row.model == POPULARITY):
        for row in rows:
            if not is_control(row) and row.model != POPULARITY:
                yield row, popularity, POPULAR


def control_of(row: Row, own: Sequence[Row], metric: str) -> Row | None:
    """Return the strongest random or shuffled control of a recommender for one of its feature sets.

    Args:
        row: whose control is asked for.
        own: all rows of its model.
        metric: that validation is judged by.
    """
    controls = [other for other in own if other.floor == "random or shuffled features"]
    alike = [other for other in controls if modalities(other.feature_set) == modalities(row.feature_set)]
    return best_on_validation(alike or controls, metric) if controls else None


def _stream(seed: int, a: Row, b: Row) -> np.random.Generator:
    names = hashlib.sha256(f"{a.label}\n{b.label}".encode()).digest()[:16]
    return np.random.default_rng([seed, int.from_bytes(names, "little")])
