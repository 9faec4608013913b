"""The comparison itself: rows, paired tests, missing floors, and what to mind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.pairs import Pair, control_of, tested_pairs
from pipeline.comparison.records import NO_FEATURES, RunRecord, check_comparable
from pipeline.comparison.rows import (
    CONTENT_KNN,
    POPULARITY,
    Row,
    best_on_validation,
    is_control,
    make_rows,
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side; :func:`compare_runs` makes one."""

    config: ComparisonConfig
    rows: list[Row]
    pairs: list[Pair]
    best: Row
    """The best row on validation."""
    best_of_model: dict[str, Row]
    """The best row of each model on validation."""
    missing_floors: list[str]
    """What a reader would need to judge the figures; empty: the comparison is controlled."""
    notes: list[str]
    """What to mind before trusting the figures."""
    dataset: str
    split_fingerprint: str
    n_users: int


def compare_runs(records: Sequence[RunRecord], config: ComparisonConfig) -> Comparison:
    """Put runs side by side: rows over seeds, paired tests over users, floors.

    What is called best, and what is tested against what, is chosen on validation alone; the test part is
    only reported. Pure: equal records and configuration give an equal comparison, in any order of records.

    Raises:
        ConfigError: runs that do not belong in one table, a metric they lack, an unknown reference.
    """
    check_comparable(records, config)
    rows = make_rows(records, config)
    pairs = tested_pairs(rows, config)
    best_of_model = {
        model: best_on_validation((row for row in rows if row.model == model), config.metric)
        for model in dict.fromkeys(row.model for row in rows)
    }
    return Comparison(
        config=config,
        rows=rows,
        pairs=pairs,
        best=best_on_validation(rows, config.metric),
        best_of_model=best_of_model,
        missing_floors=missing_floors(rows),
        notes=[
            *_notes_on_seeds(rows, pairs, config),
            *_notes_on_search(records),
            *_notes_on_listening(rows, pairs, best_of_model, config),
        ],
        dataset=records[0].dataset,
        split_fingerprint=records[0].split_fingerprint,
        n_users=len(records[0].per_user),
    )


def missing_floors(rows: Sequence[Row]) -> list[str]:
    """Return the floors that the rows lack; none missing, the comparison is controlled.

    Wanted are popularity, content ItemKNN, and for each recommender that reads features a control of its
    own, random or shuffled features. Content ItemKNN is itself a floor and needs none.
    """
    missing = []
    if all(row.floor != "popularity" for row in rows):
        missing.append(f"popularity (`{POPULARITY}`)")
    if all(row.floor != "content ItemKNN" for row in rows):
        missing.append(f"content ItemKNN (`{CONTENT_KNN}`)")
    controlled = {row.model for row in rows if row.floor == "random or shuffled features"}
    reading = dict.fromkeys(
        row.model for row in rows if row.feature_set != NO_FEATURES and row.model != CONTENT_KNN
    )
    bare = [model for model in reading if model not in controlled]
    if bare or not controlled:
        missing.append("random or shuffled features" + (f" for {', '.join(bare)}" if bare else ""))
    return missing


def _notes_on_seeds(rows: Sequence[Row], pairs: Sequence[Pair], config: ComparisonConfig) -> list[str]:
    """Return what a reader has to know of seeds and permutations before trusting the figures."""
    notes = []
    n_seeds = sorted({len(row.seeds) for row in rows if row.model != POPULARITY})
    if len(n_seeds) > 1:
        notes.append(f"Rows have between {n_seeds[0]} and {n_seeds[-1]} seeds.")
    if n_seeds and n_seeds[0] == 1:
        notes.append("A row of one seed has no spread over seeds: how far luck carried it is not known.")
    if pairs and len(pairs) / (config.n_permutations + 1) >= config.alpha:
        notes.append(
            f"{len(pairs)} tests of {config.n_permutations:,} permutations cannot become significant after "
            "correction; raise comparison.n_permutations."
        )
    return notes


def _notes_on_search(records: Sequence[RunRecord]) -> list[str]:
    """Return what a reader has to know where some settings were searched and others not, or for longer."""
    budgets = {json.dumps(_budget(run)): run for run in records if _budget(run)}
    if not budgets:
        return []
    notes = []
    if len(budgets) > 1:
        words = "; ".join(f"{run.model} {_budget(run)}" for run in budgets.values())
        notes.append(f"Settings were searched with different budgets, which favours the larger: {words}.")
    as_given = sorted({run.model for run in records if not _budget(run) and run.settings.get("settings")})
    if as_given:
        notes.append(
            f"Settings of {', '.join(as_given)} were not searched, those of other rows were: a difference "
            "between them may be that of tuning."
        )
    return notes


def _budget(run: RunRecord) -> dict[str, JsonValue]:
    """Return what a search was allowed; nothing where there was none."""
    search = run.settings.get("search")
    return (
        {name: value for name, value in search.items() if name != "space"} if isinstance(search, dict) else {}
    )


def _notes_on_listening(
    rows: Sequence[Row], pairs: Sequence[Pair], best_of_model: dict[str, Row], config: ComparisonConfig
) -> list[str]:
    """Return which recommenders show no sign of reading features: their rows cannot rank feature sets."""
    notes = []
    for model, best in best_of_model.items():
        own = [row for row in rows if row.model == model]
        if is_control(best) and not all(is_control(row) for row in own):
            notes.append(
                f"{model} does best on validation with {best.feature_set}, which means nothing: "
                "it cannot rank feature sets."
            )
            continue
        control = control_of(best, own, config.metric)
        tested = [pair for pair in pairs if pair.a is best and pair.b is control]
        if tested and not tested[0].significant:
            notes.append(
                f"{model} is not significantly better with {best.feature_set} than with "
                f"{tested[0].b.feature_set}: its rows say little about feature sets."
            )
    return notes
