"""A study's table for a terminal, for a file and for a program, and its answers in words."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue
from rich.table import Table

from pipeline.console import human_bytes
from pipeline.paradigms.table import Answer, ParadigmsTable, Row

FROM_NOTHING = (
    "Seconds, memory and bytes are what one run of a row needs from nothing: encoding, training the encoder, "
    "training the recommender and the search of its settings, shared or not."
)


def to_table(table: ParadigmsTable) -> Table:
    """For a terminal."""
    made = Table(title=_title(table), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(_columns(table)):
        made.add_column(column, justify="left" if number < 3 else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*_cells(row, table.config.alpha))
    return made


def to_markdown(table: ParadigmsTable) -> str:
    """For a file: the answers, the table, and what the seconds consist of."""
    columns = _columns(table)
    lines = [f"# {_title(table)}", "", *(f"- {line}" for line in answer_lines(table)), ""]
    lines += _markdown(columns, [_cells(row, table.config.alpha) for row in table.rows])
    lines += ["", *(f"{line}  " for line in notes(table)), ""]
    costs = ["recommender", "encoder", "paradigm", "encode s", "tune s", "train s", "search s", "device"]
    lines += _markdown(costs, [_cost_cells(row) for row in table.rows])
    return "\n".join(lines) + "\n"


def to_json(table: ParadigmsTable) -> dict[str, JsonValue]:
    """For a program; what there is not is null."""
    return {
        "metric": table.config.metric,
        "level": table.config.level,
        "answers": [_answer_json(answer) for answer in table.answers],
        "rows": [_row_json(row) for row in table.rows],
    }


def answer_lines(table: ParadigmsTable) -> list[str]:
    """Each question with its answer in words and the figures behind it."""
    return [_line(answer, table) for answer in table.answers]


def notes(table: ParadigmsTable) -> list[str]:
    """What a reader of the table has to know."""
    devices = dict.fromkeys(row.measured.costs.device for row in table.rows)
    pairs = [
        f"{row.measured.recommender} on {row.measured.encoder} against {row.against.encoder}"
        for row in table.rows
        if row.against is not None and row.measured.kind == "specific"
    ]
    chosen = [f"Tested against the best pre-trained encoder on validation: {'; '.join(pairs)}."]
    unmoved = [
        f"{row.measured.recommender} on {row.measured.encoder} {row.measured.kind} "
        f"({row.measured.n_unmoved} of {len(row.measured.test)} seeds)"
        for row in table.rows
        if row.measured.n_unmoved
    ]
    stayed = [f"Its chosen epoch left the encoder as it came: {'; '.join(unmoved)}."]
    return [
        "Differences are against the frozen features of the same encoder under the same recommender; * is "
        f"Holm's p below {table.config.alpha:g}, over all tests of the table.",
        *(chosen if pairs else []),
        *(stayed if unmoved else []),
        FROM_NOTHING,
        f"Measured on {'; '.join(devices)}.",
    ]


def _title(table: ParadigmsTable) -> str:
    return f"Paradigms: test {table.config.metric}"


def _columns(table: ParadigmsTable) -> list[str]:
    left = ["recommender", "encoder", "paradigm", "valid", "test", "difference"]
    return [*left, f"{table.config.level:.0%} interval", "Holm's p", "seconds", "peak", "stored"]


def _cells(row: Row, alpha: float) -> list[str]:
    measured, result = row.measured, row.result
    costs = measured.costs
    tested = ["", "", ""]
    if result is not None:
        difference = result.difference
        tested = [
            f"{difference.mean:+.4f}",
            f"[{difference.low:+.4f}, {difference.high:+.4f}]",
            f"{row.p_holm:.4f}{'*' if row.p_holm < alpha else ''}",
        ]
    n_seeds = len(measured.test)
    spread = f" ±{row.sd:.4f}" if n_seeds > 1 else ""
    return [
        measured.recommender,
        measured.encoder or "-",
        measured.kind,
        f"{sum(measured.valid) / n_seeds:.4f}",
        f"{sum(measured.test) / n_seeds:.4f}{spread}",
        *tested,
        f"{costs.seconds:,.1f}",
        human_bytes(costs.peak_bytes),
        human_bytes(costs.stored_bytes),
    ]


def _cost_cells(row: Row) -> list[str]:
    costs = row.measured.costs
    seconds = [costs.encode_s, costs.tune_s, costs.train_s, costs.search_s]
    names = [row.measured.recommender, row.measured.encoder or "-", row.measured.kind]
    return [*names, *(f"{value:,.1f}" for value in seconds), costs.device]


def _markdown(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _line(answer: Answer, table: ParadigmsTable) -> str:
    if answer.result is None:
        return f"{answer.question} Not asked: the study has no such rows."
    words = {
        "yes": "Yes",
        "no": "No, it does worse",
        "not separated": "Not separated",
        "not asked": "Not asked",
    }[answer.verdict]
    difference = answer.result.difference
    return (
        f"{answer.question} {words}: {table.config.metric} {answer.result.mean_a:.4f} against "
        f"{answer.result.mean_b:.4f}, {difference.mean:+.4f} with {table.config.level:.0%} interval "
        f"[{difference.low:+.4f}, {difference.high:+.4f}] over {answer.result.n_users:,} users, Holm's p "
        f"{answer.p_holm:.4f}; better in {answer.n_better} of {answer.n_rows} "
        f"pair{'s' if answer.n_rows > 1 else ''} of rows."
    )


def _answer_json(answer: Answer) -> dict[str, JsonValue]:
    shown: dict[str, JsonValue] = {"question": answer.question, "answer": answer.verdict}
    if answer.result is None:
        return shown
    difference = answer.result.difference
    return {
        **shown,
        "mean": answer.result.mean_a,
        "against": answer.result.mean_b,
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "p_holm": answer.p_holm,
        "better": answer.n_better,
        "pairs": answer.n_rows,
    }


def _row_json(row: Row) -> dict[str, JsonValue]:
    measured, result, costs = row.measured, row.result, row.measured.costs
    difference = result.difference if result is not None else None
    n_seeds = len(measured.test)
    return {
        "recommender": measured.recommender,
        "encoder": measured.encoder,
        "paradigm": measured.kind,
        "valid": sum(measured.valid) / n_seeds,
        "test": sum(measured.test) / n_seeds,
        "sd": row.sd if n_seeds > 1 else None,
        "seeds": n_seeds,
        "unmoved": measured.n_unmoved,
        "against": row.against.encoder if row.against is not None else None,
        "difference": difference.mean if difference else None,
        "interval": [difference.low, difference.high] if difference else None,
        "p_holm": row.p_holm if difference else None,
        "costs": {
            "encode_s": costs.encode_s,
            "tune_s": costs.tune_s,
            "train_s": costs.train_s,
            "search_s": costs.search_s,
            "seconds": costs.seconds,
            "peak_bytes": costs.peak_bytes,
            "stored_bytes": costs.stored_bytes,
            "device": costs.device,
        },
    }
