"""A comparison as text: Markdown as GitHub shows it, and tables for a terminal of 120 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.comparison.pairs import Pair
from pipeline.comparison.parquet import COMPARISON_FILE, PAIRS_FILE, pairs_frame, rows_frame
from pipeline.comparison.records import NO_FEATURES
from pipeline.comparison.rows import Row, Spread, is_control
from pipeline.comparison.tables import Comparison
from recommenders.significance import Interval

MARKDOWN_FILE = "comparison.md"
UNKNOWN = "–"
KEY_SHOWN = 12


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write both tables as Parquet and the whole as Markdown into a folder."""
    rows_frame(comparison).write_parquet(folder / COMPARISON_FILE)
    pairs_frame(comparison).write_parquet(folder / PAIRS_FILE)
    (folder / MARKDOWN_FILE).write_text(to_markdown(comparison), encoding="utf-8")


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: what it is worth, the rows, the tests, what to mind."""
    metric = comparison.config.metric
    lines = [f"## Comparison by {metric}", ""]
    lines += [f"- {line}" for line in _head(comparison)]
    lines += ["", *_markdown_rows(comparison), "", _rows_legend(comparison)]
    if comparison.pairs:
        lines += ["", f"### Paired tests by {metric}", "", *_markdown_pairs(comparison)]
        lines += ["", _pairs_legend(comparison)]
    if comparison.notes:
        lines += ["", "### Mind", "", *(f"- {note}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def to_terminal(comparison: Comparison) -> RenderableType:
    """Return the comparison for a rich console."""
    parts: list[RenderableType] = [
        *(Text(line.replace("**", "").replace("`", "")) for line in _head(comparison)),
        _terminal_rows(comparison),
        Text(_rows_legend(comparison).replace("**", ""), style="dim"),
    ]
    if comparison.pairs:
        parts += [Text(), _terminal_pairs(comparison)]
        parts += [Text(_pairs_legend(comparison).replace("\\", ""), style="dim")]
    parts += [Text(f"Mind: {note}") for note in comparison.notes]
    return Group(*parts)


def _head(comparison: Comparison) -> Iterator[str]:
    yield f"Best on validation: **{comparison.best.label}**."
    if comparison.missing_floors:
        yield (
            f"**Uncontrolled**: no floor of {'; none of '.join(comparison.missing_floors)}. "
            "Without it nobody can tell how much of a figure the features are worth."
        )
    else:
        yield "Controlled: popularity, content ItemKNN, and random or shuffled features are in the table."
    yield (
        f"Dataset `{comparison.dataset[:KEY_SHOWN]}`, split `{comparison.split_fingerprint[:KEY_SHOWN]}`, "
        f"{comparison.n_users:,} users. All choices were made on validation; test is only reported."
    )
    searched = [int(row.costs["search_trials"]) for row in comparison.rows if "search_trials" in row.costs]
    if searched:
        least, most = min(searched), max(searched)
        yield (
            f"Settings were searched for {len(searched)} of {len(comparison.rows)} rows, "
            f"{most if least == most else f'{least} to {most}'} trials each, and chosen on validation "
            "(fewer where a model has fewer settings to try)."
        )


def _rows_legend(comparison: Comparison) -> str:
    seeds = sorted({len(row.seeds) for row in comparison.rows})
    n_seeds = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"Mean ± standard deviation over {n_seeds} seeds; {comparison.config.level:.0%} interval over users. "
        "**Bold**: a recommender's best feature set on validation. Train: seconds of a run; encode and size: "
        "of the features it reads."
    )


def _pairs_legend(comparison: Comparison) -> str:
    config = comparison.config
    return (
        f"\\* adjusted p below {config.alpha:g}. Users are paired, their seeds averaged; p of "
        f"{config.n_permutations:,} sign flips, adjusted by Holm for all {len(comparison.pairs)} tests; "
        f"{config.level:.0%} bootstrap interval over users, not adjusted."
    )


# ------------------------------------------------------------------------------------------ Markdown


def _markdown_rows(comparison: Comparison) -> list[str]:
    config = comparison.config
    header = ["recommender", "features", "seeds", f"valid {config.metric}", f"test {config.metric}"]
    header += [f"{config.level:.0%} interval", *(f"test {metric}" for metric in config.metrics[1:])]
    tried = any("search_trials" in row.costs for row in comparison.rows)
    header += ["train", "encode", "size", "memory", *(["trials"] if tried else [])]
    body = []
    for row in comparison.rows:
        test = row.test[config.metric]
        cells = [
            row.recommender,
            row.feature_set,
            str(len(row.seeds)),
            _number(row.valid[config.metric].mean),
        ]
        cells += [_spread(test), _interval(test.over_users)]
        cells += [_spread(row.test[metric]) for metric in config.metrics[1:]]
        cells += [*_costs(row), _bytes(row.costs.get("peak_memory_bytes"))]
        if tried:
            cells.append(_trials(row))
        if _stands_out(comparison, row):
            cells = [f"**{cell}**" if place in {0, 1, 4} else cell for place, cell in enumerate(cells)]
        body.append(cells)
    return _markdown_table(header, body, n_left=2)


def _markdown_pairs(comparison: Comparison) -> list[str]:
    header = ["row", "against", "difference", f"{comparison.config.level:.0%} interval"]
    header += ["users better : worse", "p", "adjusted p", "Wilcoxon p"]
    body = []
    for pair in comparison.pairs:
        result = pair.result
        star = " \\*" if pair.significant else ""
        cells = [pair.a.label, _against(pair), f"{result.difference.mean:+.4f}"]
        cells += [_interval(result.difference, signed=True), f"{result.n_better:,} : {result.n_worse:,}"]
        cells += [_p(result.sign_flip.p_value), _p(pair.p_holm) + star, _p(result.p_wilcoxon)]
        body.append(cells)
    return _markdown_table(header, body, n_left=2)


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """Return the lines of a table whose first columns are aligned left, the others right."""
    rule = [":--" if place < n_left else "--:" for place in range(len(header))]
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *body)
    ]


# ------------------------------------------------------------------------------------------ terminal


def _terminal_rows(comparison: Comparison) -> Table:
    """Return a table with a line for each recommender and one, indented, for each of its feature sets."""
    config = comparison.config
    table = _table("recommender, features", "seeds", "valid", f"test {config.metric}")
    tried = any("search_trials" in row.costs for row in comparison.rows)
    trials = ["trials"] if tried else []
    for name in (f"{config.level:.0%} interval", *config.metrics[1:], "train", "encode", "size", *trials):
        table.add_column(name, justify="right", no_wrap=True)
    for recommender, group in groupby(comparison.rows, key=lambda row: row.recommender):
        rows = list(group)
        alone = len(rows) == 1 and rows[0].feature_set == NO_FEATURES
        if not alone:
            table.add_row(Text(recommender))
        for row in rows:
            test = row.test[config.metric]
            table.add_row(
                Text(recommender if alone else f"  {row.feature_set}"),
                str(len(row.seeds)),
                _number(row.valid[config.metric].mean),
                _spread(test),
                _interval(test.over_users),
                *(_number(row.test[metric].mean) for metric in config.metrics[1:]),
                *_costs(row),
                *([_trials(row)] if tried else []),
                style="bold" if _stands_out(comparison, row) else "dim" if is_control(row) else "",
            )
    return table


def _terminal_pairs(comparison: Comparison) -> Table:
    table = _table("row")
    table.add_column("against", overflow="fold")
    for name in ("gain", f"{comparison.config.level:.0%} interval", "better:worse", "Holm's p"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, group in groupby(comparison.pairs, key=lambda pair: pair.a.label):
        for place, pair in enumerate(group):
            result = pair.result
            table.add_row(
                Text("" if place else label),
                Text(_against(pair)),
                f"{result.difference.mean:+.4f}",
                _interval(result.difference, signed=True),
                f"{result.n_better:,}:{result.n_worse:,}",
                _p(pair.p_holm) + ("*" if pair.significant else " "),
            )
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


# --------------------------------------------------------------------------------------------- cells


def _stands_out(comparison: Comparison, row: Row) -> bool:
    """Whether the row is the best of several feature sets of its model, on validation."""
    several = sum(other.model == row.model for other in comparison.rows) > 1
    return several and row is comparison.best_of_model[row.model]


def _against(pair: Pair) -> str:
    """Return the other row's name, short where the recommender is the same."""
    return pair.b.feature_set if pair.a.recommender == pair.b.recommender else pair.b.label


def _number(value: float) -> str:
    return f"{value:.4f}"


def _spread(spread: Spread) -> str:
    return _number(spread.mean) if math.isnan(spread.sd) else f"{spread.mean:.4f} ±{spread.sd:.4f}"


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None or math.isnan(interval.low):
        return UNKNOWN
    sign = "+" if signed else ""
    return f"[{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def _p(p_value: float) -> str:
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def _costs(row: Row) -> list[str]:
    reads = row.feature_set != NO_FEATURES
    return [
        _seconds(row.costs.get("train_seconds")),
        _seconds(row.costs.get("feature_seconds") if reads else None),
        _bytes(row.costs.get("feature_bytes") if reads else None),
    ]


def _trials(row: Row) -> str:
    return f"{row.costs['search_trials']:.0f}" if "search_trials" in row.costs else UNKNOWN


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:,.1f} min"


def _bytes(n_bytes: float | None) -> str:
    if n_bytes is None:
        return UNKNOWN
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"
