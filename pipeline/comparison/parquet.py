"""A comparison as long-form tables that programs read, and back from them to be shown again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.pairs import Pair
from pipeline.comparison.rows import COSTS, Row, Spread
from pipeline.comparison.tables import Comparison
from recommenders.significance import Interval, PairedComparison, SignFlipTest

COMPARISON_FILE = "comparison.parquet"
PAIRS_FILE = "pairs.parquet"


def rows_frame(comparison: Comparison) -> pl.DataFrame:
    """Return one row for each row of the comparison and each metric; what was not measured is null."""
    metrics = comparison.config.metrics
    measured = [_measured(comparison, row, metric) for row in comparison.rows for metric in metrics]
    return pl.DataFrame(measured, schema=_ROW_SCHEMA)


def pairs_frame(comparison: Comparison) -> pl.DataFrame:
    """Return one row for each paired test."""
    return pl.DataFrame([_tested(comparison, pair) for pair in comparison.pairs], schema=_PAIR_SCHEMA)


def read_comparison(rows: Path, pairs: Path, config: ComparisonConfig) -> Comparison:
    """Return a comparison from its two Parquet files, to be shown as it was the first time.

    What the files do not hold stays empty: users' values, and the interval of validation over seeds.

    Args:
        rows: ``comparison.parquet``.
        pairs: ``pairs.parquet``.
        config: what the comparison was made with.
    """
    table = pl.read_parquet(rows)
    groups = table.partition_by("row", maintain_order=True)
    made = {group["row"][0]: _row(group.to_dicts()) for group in groups}
    first = table.row(0, named=True)
    best = table.filter("best")["row"][0]
    return Comparison(
        config=config,
        rows=list(made.values()),
        pairs=[_pair(tested, made) for tested in pl.read_parquet(pairs).iter_rows(named=True)],
        best=made[best],
        best_of_model={
            made[label].model: made[label] for label in table.filter("best_of_model")["row"].unique()
        },
        missing_floors=first["missing_floors"],
        notes=first["notes"],
        dataset=first["dataset"],
        split_fingerprint=first["split_fingerprint"],
        n_users=first["n_users"],
    )


def _measured(comparison: Comparison, row: Row, metric: str) -> dict[str, object]:
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
        "level": comparison.config.level,
        "n_users": comparison.n_users,
        "best_of_model": row is comparison.best_of_model[row.model],
        "best": row is comparison.best,
        **{name: row.costs.get(name) for name in COSTS},
        "dataset": comparison.dataset,
        "split_fingerprint": comparison.split_fingerprint,
        "missing_floors": comparison.missing_floors,
        "notes": comparison.notes,
    }


def _row(measured: list[dict[str, Any]]) -> Row:
    """Return a row from its metrics, one dictionary each, as :func:`_measured` made them."""
    first = measured[0]
    n_seeds = first["n_seeds"]
    return Row(
        **{name: first[name] for name in ("model", "feature_set", "variant", "settings", "floor")},
        seeds=tuple(first["seeds"]),
        runs=tuple(first["runs"]),
        valid={
            of["metric"]: Spread(
                mean=of["valid"],
                sd=_or_nan(of["valid_sd"]),
                over_seeds=Interval(of["valid"], math.nan, math.nan, of["level"], n_seeds),
                over_users=None,
            )
            for of in measured
        },
        test={
            of["metric"]: Spread(
                mean=of["test"],
                sd=_or_nan(of["test_sd"]),
                over_seeds=_interval(of, "test", "seeds", n_seeds),
                over_users=None if of["users_low"] is None else _interval(of, "test", "users", of["n_users"]),
            )
            for of in measured
        },
        costs={name: first[name] for name in COSTS if first.get(name) is not None},
        per_user=np.empty(0),
    )


def _tested(comparison: Comparison, pair: Pair) -> dict[str, object]:
    result = pair.result
    return {
        "a": pair.a.label,
        "b": pair.b.label,
        "question": pair.question,
        "metric": comparison.config.metric,
        "a_mean": result.mean_a,
        "b_mean": result.mean_b,
        "difference": result.difference.mean,
        **_ends("difference", result.difference),
        "level": comparison.config.level,
        "p_sign_flip": result.sign_flip.p_value,
        "p_holm": pair.p_holm,
        "p_wilcoxon": result.p_wilcoxon,
        "significant": pair.significant,
        "alpha": comparison.config.alpha,
        "n_tests": len(comparison.pairs),
        "n_flips": result.sign_flip.n_flips,
        "exact": result.sign_flip.exact,
        "n_users": result.n_users,
        "n_better": result.n_better,
        "n_worse": result.n_worse,
        "dataset": comparison.dataset,
        "split_fingerprint": comparison.split_fingerprint,
    }


def _pair(tested: dict[str, Any], rows: Mapping[str, Row]) -> Pair:
    result = PairedComparison(
        mean_a=tested["a_mean"],
        mean_b=tested["b_mean"],
        difference=_interval(tested, "difference", "difference", tested["n_users"]),
        sign_flip=SignFlipTest(tested["p_sign_flip"], tested["n_flips"], tested["exact"]),
        p_wilcoxon=tested["p_wilcoxon"],
        n_better=tested["n_better"],
        n_worse=tested["n_worse"],
        n_users=tested["n_users"],
    )
    a, b = rows[tested["a"]], rows[tested["b"]]
    return Pair(a, b, tested["question"], result, tested["p_holm"], tested["significant"])


def _ends(name: str, interval: Interval | None) -> dict[str, object]:
    return {
        f"{name}_low": None if interval is None else _known(interval.low),
        f"{name}_high": None if interval is None else _known(interval.high),
    }


def _interval(of: dict[str, Any], mean: str, name: str, n: int) -> Interval:
    return Interval(of[mean], _or_nan(of[f"{name}_low"]), _or_nan(of[f"{name}_high"]), of["level"], n)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


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
        **dict.fromkeys(("missing_floors", "notes"), pl.List(pl.String())),
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
