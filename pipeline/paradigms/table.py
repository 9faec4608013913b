"""The table of a study: each row against the frozen features of the same encoder, and three questions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.comparison.config import ComparisonConfig
from pipeline.paradigms.costs import Costs, costs_of
from pipeline.paradigms.way import Contender, Kind, SeedRun
from pipeline.stages.compare_features import read_record
from recommenders.significance import PairedComparison, compare_paired, holm, mean_over_seeds

Verdict = Literal["yes", "no", "not separated", "not asked"]
PerUser = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a row was measured at."""

    recommender: str
    encoder: str
    kind: Kind
    valid: tuple[float, ...]
    """(S,) the deciding metric on validation, a seed each."""
    test: tuple[float, ...]
    """(S,) the same on test."""
    per_user: PerUser = field(repr=False)
    """(U,) the same of each user on test, seeds averaged, by ascending user row."""
    costs: Costs
    n_unmoved: int = 0
    """Seeds whose chosen epoch is the encoder as it came, although it was trained."""

    @property
    def label(self) -> str:
        """Names the row, and the stream of its test."""
        return f"{self.recommender} / {self.encoder} / {self.kind}"


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table."""

    measured: Measured
    against: Measured | None
    """The frozen features it is tested against; None for these themselves and for floors."""
    result: PairedComparison | None
    """Of the row against those, users paired, seeds averaged."""
    p_holm: float
    """NaN without a test."""

    @property
    def sd(self) -> float:
        """Standard deviation of the test metric over seeds; NaN for one seed."""
        test = self.measured.test
        return float(np.std(test, ddof=1)) if len(test) > 1 else float("nan")


@dataclass(frozen=True, eq=False)
class Answer:
    """One question of the study."""

    question: str
    verdict: Verdict
    """``not separated``: the test does not tell the two sides apart, which is not that they are equal."""
    result: PairedComparison | None
    """One side against the other: each user's metric averaged over all rows of the side."""
    p_holm: float
    n_better: int
    """Pairs of rows in which the first side is better on test."""
    n_rows: int
    """Pairs of rows in all."""


@dataclass(frozen=True, eq=False)
class ParadigmsTable:
    """All of it; the tests of rows and questions are one family for Holm's correction."""

    config: ComparisonConfig
    rows: list[Row]
    answers: list[Answer]


def measure(contender: Contender, metric: str) -> Measured:
    """Read what a row's runs left."""
    records = [read_record(one.run.artefact) for one in contender.runs]
    values = [record.user_values(metric) for record in records]
    return Measured(
        contender.recommender,
        contender.encoder,
        contender.kind,
        valid=tuple(record.valid[metric] for record in records),
        test=tuple(record.test[metric] for record in records),
        per_user=mean_over_seeds([value for value in values if value is not None]),
        costs=costs_of(contender.runs),
        n_unmoved=sum(_is_unmoved(one) for one in contender.runs),
    )


def _is_unmoved(one: SeedRun) -> bool:
    """Whether validation chose fine-tuning's epoch 0, or an epoch of joint training's warm-up."""
    if one.features.encoder is None:
        return False
    manifest = one.features.encoder.artefact.manifest
    warm_up = manifest.parameters["joint"] if one.features.before else {}
    n_frozen = warm_up.get("warmup_epochs", 0) if isinstance(warm_up, dict) else 0
    return int(str(manifest.facts["best_epoch"])) <= int(str(n_frozen))


def make_table(measured: Sequence[Measured], config: ComparisonConfig) -> ParadigmsTable:
    """Test each row against its reference, and the three questions.

    A fine-tuned and a joint row are tested against the pre-trained row of their encoder and recommender; a
    modality-specific one against the pre-trained row of that recommender that is best on validation; random
    and shuffled features against that of the first encoder, from which they were made.

    Args:
        measured: All rows, in the order in which they are shown.
        config: The metric's name, the level, and how tests draw.
    """
    pairs = [(one, _reference(one, measured)) for one in measured]
    tested = {
        one.label: _compare(one.per_user, other.per_user, config, one.label)
        for one, other in pairs
        if other is not None
    }
    asked = [
        _sides(measured, "pretrained", "specific"),
        _sides(measured, "finetuned", "pretrained"),
        _sides(measured, "joint", "pretrained"),
    ]
    of_questions: dict[str, PairedComparison] = {}
    stands_for: dict[str, str] = {}
    for question, found in zip(QUESTIONS, asked, strict=True):
        if len(found) == 1:  # the row's own test answers it, and is no second one
            stands_for[question] = next(one.label for one in found[0] if one.label in tested)
        elif found:
            of_questions[question] = _compare(_mean(found, 0), _mean(found, 1), config, question)
    every = {**tested, **of_questions}
    p_values = dict(zip(every, holm([one.sign_flip.p_value for one in every.values()]), strict=True))
    rows = [
        Row(one, other, tested.get(one.label), float(p_values.get(one.label, np.nan))) for one, other in pairs
    ]
    answers = []
    for question, found in zip(QUESTIONS, asked, strict=True):
        name = stands_for.get(question, question)
        result = every.get(name)
        if result is not None and question in stands_for and found[0][1].label == name:
            result = _turned(result)
        answers.append(_answer(question, found, result, float(p_values.get(name, np.nan)), config.alpha))
    return ParadigmsTable(config, rows, answers)


QUESTIONS = (
    "Do multimodal encoders beat modality-specific ones?",
    "Does fine-tuning on the catalogue help?",
    "Does end-to-end training help?",
)


def _reference(one: Measured, measured: Sequence[Measured]) -> Measured | None:
    own = [row for row in measured if row.recommender == one.recommender and row.kind == "pretrained"]
    if one.kind in {"finetuned", "joint"}:
        return next(row for row in own if row.encoder == one.encoder)
    if one.kind == "specific":
        return max(own, key=lambda row: float(np.mean(row.valid)))
    return own[0] if one.kind == "control" else None


def _sides(measured: Sequence[Measured], first: Kind, second: Kind) -> list[tuple[Measured, Measured]]:
    """Each row of the first kind with each of the second that it belongs beside."""
    return [
        (a, b)
        for a in measured
        for b in measured
        if (a.kind, b.kind, a.recommender) == (first, second, b.recommender)
        and (second == "specific" or a.encoder == b.encoder)
    ]


def _mean(pairs: Sequence[tuple[Measured, Measured]], side: int) -> PerUser:
    """(U,) of each user the mean over the pairs: every recommender and every encoder counts the same."""
    return mean_over_seeds([pair[side].per_user for pair in pairs])


def _compare(a: PerUser, b: PerUser, config: ComparisonConfig, label: str) -> PairedComparison:
    """Each test draws from a stream of its own, so that a row more or less does not change the others."""
    number = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8])
    return compare_paired(
        a,
        b,
        np.random.default_rng([config.seed, number]),
        n_permutations=config.n_permutations,
        n_resamples=config.n_resamples,
        level=config.level,
    )


def _turned(result: PairedComparison) -> PairedComparison:
    """The same test from the other side."""
    difference = result.difference
    turned = replace(difference, mean=-difference.mean, low=-difference.high, high=-difference.low)
    return replace(
        result,
        mean_a=result.mean_b,
        mean_b=result.mean_a,
        difference=turned,
        n_better=result.n_worse,
        n_worse=result.n_better,
    )


def _answer(
    question: str,
    pairs: Sequence[tuple[Measured, Measured]],
    result: PairedComparison | None,
    p_holm: float,
    alpha: float,
) -> Answer:
    verdict: Verdict = "not asked"
    if result is not None:
        verdict = "not separated"
        if p_holm < alpha:
            verdict = "yes" if result.difference.mean > 0 else "no"
    n_better = sum(float(np.mean(a.test)) > float(np.mean(b.test)) for a, b in pairs)
    return Answer(question, verdict, result, p_holm, n_better, len(pairs))
