"""A comparison as Markdown, in a terminal, and as Parquet."""

import io
import re
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.parquet import pairs_frame, read_comparison, rows_frame
from pipeline.comparison.render import to_markdown, to_terminal, write_comparison
from pipeline.comparison.tables import Comparison, compare_runs
from tests.pipeline.comparison_runs import demo_runs, record

QUICK = ComparisonConfig(n_permutations=2_000, n_resamples=200)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare_runs(demo_runs(), QUICK)


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Return each table of a Markdown text as rows of cells, as GitHub would split them."""
    tables, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            tables.append(lines)
            lines = []
    return tables


def in_terminal(comparison: Comparison, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(to_terminal(comparison))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_markdown_holds_every_row_and_every_test_in_whole_tables(comparison: Comparison) -> None:
    rows, pairs = markdown_tables(to_markdown(comparison))
    assert len(rows) == 2 + len(comparison.rows)
    assert len(pairs) == 2 + len(comparison.pairs)
    assert {len(line) for line in rows} == {11}
    assert {len(line) for line in pairs} == {8}
    assert all(re.fullmatch(r":--|--:", cell) for cell in rows[1] + pairs[1])


def test_markdown_shows_four_digits_spread_and_interval(comparison: Comparison) -> None:
    rows = markdown_tables(to_markdown(comparison))[0]
    row = comparison.rows[1]
    test = row.test["recall@20"]
    assert test.over_users is not None
    assert rows[3][:7] == [
        "bpr",
        "-",
        "3",
        f"{row.valid['recall@20'].mean:.4f}",
        f"{test.mean:.4f} ±{test.sd:.4f}",
        f"[{test.over_users.low:.4f}, {test.over_users.high:.4f}]",
        f"{row.test['ndcg@20'].mean:.4f} ±{row.test['ndcg@20'].sd:.4f}",
    ]
    assert rows[3][7:] == ["11.0 s", "–", "–", "–"]
    assert rows[4][7:] == ["11.0 s", "4.0 s", "2.0 MB", "–"]


def test_markdown_prints_the_best_feature_set_of_each_recommender_bold(comparison: Comparison) -> None:
    rows = markdown_tables(to_markdown(comparison))[0]
    bold = [(line[0], line[1]) for line in rows if line[0].startswith("**")]
    assert bold == [("**itemknn_content**", "**tiny image+text**"), ("**vbpr**", "**tiny image+text**")]
    assert "Best on validation: **vbpr / tiny image+text**" in to_markdown(comparison)


def test_markdown_stars_significant_tests_and_explains_the_star(comparison: Comparison) -> None:
    text = to_markdown(comparison)
    pairs = markdown_tables(text)[1][2:]
    starred = [line[6].endswith("\\*") for line in pairs]
    assert starred == [pair.significant for pair in comparison.pairs]
    assert any(starred)
    assert not all(starred)
    assert "\\* adjusted p below 0.05" in text


def test_split_dataset_and_users_stand_beside_the_figures(comparison: Comparison) -> None:
    for text in (to_markdown(comparison).replace("`", ""), in_terminal(comparison)):
        assert "Dataset dddddddddddd, split ffffffffffff, 60 users" in text
        assert "Controlled" in text


def test_a_comparison_without_floors_says_uncontrolled_and_what_is_missing() -> None:
    bare = compare_runs([record(), record("bpr", "-")], QUICK)
    for text in (to_markdown(bare), in_terminal(bare, width=400)):
        assert "Uncontrolled" in text
        assert re.search("popularity.*content ItemKNN.*random or shuffled features for vbpr", text)
        assert "Controlled:" not in text


def test_notes_are_shown() -> None:
    noted = compare_runs([record()], QUICK)
    assert noted.notes
    assert f"- {noted.notes[0]}" in to_markdown(noted)
    assert f"Mind: {noted.notes[0]}" in in_terminal(noted)


def test_a_single_row_has_no_table_of_tests() -> None:
    alone = compare_runs([record("bpr", "-")], QUICK)
    assert len(markdown_tables(to_markdown(alone))) == 1
    assert "Paired" not in to_markdown(alone)
    assert "better:worse" not in in_terminal(alone)


def test_a_terminal_of_120_columns_shows_every_figure_on_one_line(comparison: Comparison) -> None:
    lines = in_terminal(comparison).splitlines()
    assert max(len(line) for line in lines) <= 120
    for row in comparison.rows:
        name = row.recommender if row.feature_set == "-" else row.feature_set
        figure = f"{row.test['recall@20'].mean:.4f} ±{row.test['recall@20'].sd:.4f}"
        assert any(name in line and figure in line for line in lines), row.label
    for pair in comparison.pairs:
        assert any(f"{pair.result.difference.mean:+.4f}" in line for line in lines)
    assert any("itemknn_content / tiny image+text" in line for line in lines)


def test_a_narrow_terminal_folds_names_and_keeps_figures(comparison: Comparison) -> None:
    text = in_terminal(comparison, width=100)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert f"{comparison.rows[0].test['recall@20'].mean:.4f}" in text


def test_a_single_user_has_no_interval_and_a_dash_says_so() -> None:
    cells = markdown_tables(to_markdown(compare_runs([record(users=[0.5])], QUICK)))[0][2]
    assert cells[4:6] == ["0.5000", "–"]


def test_names_with_pipes_and_brackets_break_no_table() -> None:
    odd = compare_runs(
        [record(feature_set="a|b [red]x[/red] image"), record(feature_set="tiny image")], QUICK
    )
    rows = markdown_tables(to_markdown(odd))[0]
    assert {len(line) for line in rows} == {11}
    assert "[red]x[/red]" in in_terminal(odd)


def test_long_times_and_sizes_are_shown_in_units_that_read() -> None:
    slow = record(
        facts={
            "train_seconds": 7200.0,
            "feature_seconds": 90.0,
            "feature_bytes": 3e9,
            "peak_memory_bytes": 5e8,
        }
    )
    cells = markdown_tables(to_markdown(compare_runs([slow], QUICK)))[0][2]
    assert cells[7:] == ["120.0 min", "90.0 s", "3.0 GB", "500.0 MB"]


def test_tables_come_back_from_parquet_in_long_form(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    table = pl.read_parquet(tmp_path / "comparison.parquet")
    assert table.equals(rows_frame(comparison))
    assert len(table) == 2 * len(comparison.rows)
    assert set(table["metric"]) == {"recall@20", "ndcg@20"}
    row = table.row(
        by_predicate=(pl.col("row") == "vbpr / tiny image") & (pl.col("metric") == "recall@20"), named=True
    )
    expected = comparison.rows[7]
    assert (row["model"], row["feature_set"], row["seeds"], row["floor"]) == (
        "vbpr",
        "tiny image",
        [0, 1, 2],
        "",
    )
    assert row["test"] == expected.test["recall@20"].mean
    assert row["split_fingerprint"] == "f" * 64
    assert row["peak_memory_bytes"] is None
    assert table.filter(pl.col("best"))["row"].unique().to_list() == ["vbpr / tiny image+text"]
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == to_markdown(comparison)
    pairs = pl.read_parquet(tmp_path / "pairs.parquet")
    assert pairs.equals(pairs_frame(comparison))
    assert pairs["n_tests"].unique().to_list() == [len(comparison.pairs)]
    assert pairs["significant"].to_list() == [pair.significant for pair in comparison.pairs]


def test_what_was_not_measured_is_null_in_tables(tmp_path: Path) -> None:
    alone = compare_runs([record("bpr", "-")], QUICK)
    write_comparison(alone, tmp_path)
    table = pl.read_parquet(tmp_path / "comparison.parquet")
    assert table["test_sd"].null_count() == table["seeds_low"].null_count() == 2
    assert table["users_low"].null_count() == 0
    assert len(pl.read_parquet(tmp_path / "pairs.parquet")) == 0


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_comparison_read_back_from_its_tables_shows_as_before(
    seeds: tuple[int, ...], tmp_path: Path
) -> None:
    config = QUICK.model_copy(update={"more_metrics": ("ndcg@20", "coverage@20")})
    runs = [run for run in demo_runs(seeds) if run.model != "popularity"]
    made = compare_runs(runs, config)
    assert made.missing_floors
    write_comparison(made, tmp_path)
    read = read_comparison(tmp_path / "comparison.parquet", tmp_path / "pairs.parquet", config)
    assert to_markdown(read) == to_markdown(made)
    assert in_terminal(read) == in_terminal(made)
    assert rows_frame(read).equals(rows_frame(made))
    assert pairs_frame(read).equals(pairs_frame(made))
