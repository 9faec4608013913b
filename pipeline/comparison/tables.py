"""The comparison: rows, paired tests, missing floors; and as tables that programs read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.pairs import Pair, control_of, tested_pairs
from pipeline.comparison.records import NO_FEATURES, RunRecord, check_comparable
from pipeline.comparison.rows import (
    CONTENT_KNN,
    COSTS,
    POPULARITY,
    Row,
    best_on_validation,
    is_control,
    make_rows,
)
from recommenders.significance import Interval


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
    dataset: str
    split_fingerprint: str
    n_users: int

    def frame(self) -> pl.DataFrame:
        """One row for each row of the comparison and each metric; what was not measured is null."""
        return pl.DataFrame(
            [self._measured(row, metric) for row in self.rows for metric in self.config.metrics],
            schema=_ROW_SCHEMA,
        )

    def pairs_frame(self) -> pl.DataFrame:
        """One row for each paired test."""
        return pl.DataFrame([self._tested(pair) for pair in self.pairs], schema=_PAIR_SCHEMA)

    def _measured(self, row: Row, metric: str) -> dict[str, object]:
        valid, test = row.valid[metric], row.test[metric]
        return {
            "row": row.label,
            "model": row.model,
            "feature_set": row.feature_set,
            "variant": row.variant,
            "settings": row.settings,
            "floor": row.floor,
            "metric": metric,
            "n_seeds": len(row.seeds),
            "seeds": list(row.seeds),
            "runs": list(row.runs),
            "valid": valid.mean,
            "valid_sd": _known(valid.sd),
            "test": test.mean,
            "test_sd": _known(test.sd),
            **_ends("seeds", test.over_seeds),
            **_ends("users", test.over_users),
            "level": self.config.level,
            "n_users": self.n_users,
            "best_of_model": row is self.best_of_model[row.model],
            "best": row is self.best,
            **{name: row.costs.get(name) for name in COSTS},
            "dataset": self.dataset,
            "split_fingerprint": self.split_fingerprint,
            "missing_floors": list(self.missing_floors),
        }

    def _tested(self, pair: Pair) -> dict[str, object]:
        result = pair.result
        return {
            "a": pair.a.label,
            "b": pair.b.label,
            "question": pair.question,
            "metric": self.config.metric,
            "a_mean": result.mean_a,
            "b_mean": result.mean_b,
            "difference": result.difference.mean,
            **_ends("difference", result.difference),
            "level": self.config.level,
            "p_sign_flip": result.sign_flip.p_value,
            "p_holm": pair.p_holm,
            "p_wilcoxon": result.p_wilcoxon,
            "significant": pair.significant,
            "alpha": self.config.alpha,
            "n_tests": len(self.pairs),
            "n_flips": result.sign_flip.n_flips,
            "exact": result.sign_flip.exact,
            "n_users": result.n_users,
            "n_better": result.n_better,
            "n_worse": result.n_worse,
            "dataset": self.dataset,
            "split_fingerprint": self.split_fingerprint,
        }


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


def _ends(name: str, interval: Interval | None) -> dict[str, object]:
    return {
        f"{name}_low": None if interval is None else _known(interval.low),
        f"{name}_high": None if interval is None else _known(interval.high),
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


_ROW_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(
            ("row", "model", "feature_set", "variant", "settings", "floor", "metric"), pl.String()
        ),
        "n_seeds": pl.Int64(),
        "seeds": pl.List(pl.Int64()),
        "runs": pl.List(pl.String()),
        **dict.fromkeys(("valid", "valid_sd", "test", "test_sd"), pl.Float64()),
        **dict.fromkeys(("seeds_low", "seeds_high", "users_low", "users_high", "level"), pl.Float64()),
        "n_users": pl.Int64(),
        **dict.fromkeys(("best_of_model", "best"), pl.Boolean()),
        **dict.fromkeys(COSTS, pl.Float64()),
        **dict.fromkeys(("dataset", "split_fingerprint"), pl.String()),
        "missing_floors": pl.List(pl.String()),
    }
)
_PAIR_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("a", "b", "question", "metric"), pl.String()),
        **dict.fromkeys(("a_mean", "b_mean", "difference"), pl.Float64()),
        **dict.fromkeys(("difference_low", "difference_high", "level"), pl.Float64()),
        **dict.fromkeys(("p_sign_flip", "p_holm", "p_wilcoxon"), pl.Float64()),
        "significant": pl.Boolean(),
        "alpha": pl.Float64(),
        **dict.fromkeys(("n_tests", "n_flips"), pl.Int64()),
        "exact": pl.Boolean(),
        **dict.fromkeys(("n_users", "n_better", "n_worse"), pl.Int64()),
        **dict.fromkeys(("dataset", "split_fingerprint"), pl.String()),
    }
)
