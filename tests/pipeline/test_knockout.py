"""Knock-outs: which feature sets they make, and that the table says what the runs measured."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from flows.cli import app
from pipeline.config import FeatureSetConfig, RunConfig, parse_config
from pipeline.console import run_app
from pipeline.errors import ConfigError
from pipeline.knockout import knockout_config, knockout_results, knockouts, to_json, to_markdown
from pipeline.store import Store
from pipeline.two_stage import PlainStages, TwoStageResult, run_two_stage
from tests.pipeline.small_runs import SMALL_RUN

RUN = SMALL_RUN | {
    "feature_sets": [{"image": "tiny", "text": "tiny"}],
    "recommenders": [
        {"model": "popularity"},
        {"model": "itemknn_content"},
        {"model": "vbpr", "settings": {"dim": 4}},
    ],
    "seeds": [0, 1],
}


def test_each_modality_and_both_are_replaced_in_each_way() -> None:
    found = knockouts(FeatureSetConfig(image="tiny", text="tiny"))
    made = {(one.modalities, one.how): (one.feature_set.image, one.feature_set.text) for one in found}
    both = ("image", "text")
    assert made == {
        (("image",), "noise"): (("random:96",), ("tiny",)),
        (("image",), "shuffled"): (("shuffled:tiny",), ("tiny",)),
        (("image",), "constant"): (("constant:96",), ("tiny",)),
        (("image",), "left out"): ("", ("tiny",)),
        (("text",), "noise"): (("tiny",), ("random:96",)),
        (("text",), "shuffled"): (("tiny",), ("shuffled:tiny",)),
        (("text",), "constant"): (("tiny",), ("constant:96",)),
        (("text",), "left out"): (("tiny",), ""),
        (both, "noise"): (("random:96",), ("random:96",)),
        (both, "shuffled"): (("shuffled:tiny",), ("shuffled:tiny",)),
        (both, "constant"): (("constant:96",), ("constant:96",)),
    }


def test_one_modality_is_never_left_out_and_given_vectors_are_not_shuffled() -> None:
    assert [one.how for one in knockouts(FeatureSetConfig(image="given"))] == ["noise", "constant"]
    assert [one.how for one in knockouts(FeatureSetConfig(text="tiny"))] == ["noise", "shuffled", "constant"]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse_config(RUN, RunConfig)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("knockout") / "store")


@pytest.fixture(scope="module")
def result(config: RunConfig, store: Store) -> TwoStageResult:
    return run_two_stage(knockout_config(config)[0], PlainStages(store))


def test_the_table_says_what_the_runs_measured(config: RunConfig, result: TwoStageResult) -> None:
    wanted, found = knockout_config(config)
    assert wanted.name == "small-knockout"
    results = knockout_results(wanted, found, result)
    assert len(results) == 2 * 11
    assert [one.recommender for one in results[::11]] == ["itemknn_content", "vbpr"]
    measured: dict[tuple[str, str], list[float]] = {}
    for run in result.runs:
        shown = run.artefact.manifest.parameters
        values = pl.read_parquet(run.artefact.path("metrics.parquet"))
        value = values.filter((pl.col("part") == "test") & (pl.col("metric") == "recall@5"))["value"][0]
        measured.setdefault((shown["model"], shown["feature_set"]), []).append(value)
    means = {key: sum(values) / len(values) for key, values in measured.items()}
    for one in results:
        assert one.result.mean_b == pytest.approx(means[one.recommender, "tiny image+text"])
    shuffled = next(one for one in results if one.modalities == ("image", "text") and one.how == "shuffled")
    assert shuffled.result.mean_a == pytest.approx(means["itemknn_content", "shuffled:tiny image+text"])
    assert shuffled.change == pytest.approx(shuffled.result.mean_a / shuffled.result.mean_b - 1)
    text = to_markdown(results, wanted)
    assert text.count("\n") == 2 + len(results)
    assert "| vbpr | image+text | noise |" in text
    assert len(to_json(results)) == len(results)


def test_the_command_prints_and_writes_the_table(
    result: TwoStageResult, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, table = tmp_path / "run.yaml", tmp_path / "table.md"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    code = run_app(app, ["knockout", str(path), "--store", str(store.url), "-o", str(table), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert len(shown["knockouts"]) == 22
    assert shown["comparison"] == result.comparison.artefact.ref
    assert table.read_text(encoding="utf-8").startswith("| recommender | replaced | by | whole recall@5 |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feature_sets": [{"image": "tiny"}, {"text": "tiny"}]},
            "takes one feature set apart, and feature_sets lists 2",
        ),
        (
            {"recommenders": [{"model": "popularity"}]},
            r"none of the recommenders \(popularity\) reads features",
        ),
        ({"feature_sets": [{"image": "random:8"}]}, "random:8 is noise already"),
    ],
)
def test_what_cannot_be_knocked_out_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        knockout_config(parse_config(RUN | changes, RunConfig))
