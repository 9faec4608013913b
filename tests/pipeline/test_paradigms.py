"""The study of paradigms: what is refused, what is made once, and that the table says what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from features.encoders.registry import describe_encoder
from flows.cli import app
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import parse_config
from pipeline.console import EXIT_USER_ERROR, run_app
from pipeline.errors import ConfigError
from pipeline.paradigms.config import ParadigmsConfig, check_encoders
from pipeline.paradigms.costs import Costs, costs_of
from pipeline.paradigms.once import OnceStages
from pipeline.paradigms.render import answer_lines, notes, to_json, to_markdown
from pipeline.paradigms.table import Measured, make_table, measure
from pipeline.paradigms.way import (
    Contender,
    Kind,
    ParadigmsResult,
    PlainParadigmStages,
    named_apart,
    run_paradigms,
)
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import best_choice
from pipeline.store import Store
from recommenders.significance import holm
from tests.pipeline.small_runs import SMALL_DATASET

pytestmark = pytest.mark.usefixtures("one_thread")

STUDY: dict[str, Any] = {
    "name": "study",
    "dataset": SMALL_DATASET,
    "specific": [{"image": "tiny", "text": "tfidf+dim=16"}],
    "encoders": ["tiny"],
    "recommenders": [{"model": "bpr", "settings": {"dim": 4}}, {"model": "vbpr", "settings": {"dim": 4}}],
    "training": {
        "epochs": 2,
        "batch_size": 64,
        "learning_rate": 0.01,
        "patience": 0,
        "monitor": "recall@5",
    },
    "evaluation": {"ks": [5, 10]},
    "comparison": {"metric": "recall@5", "more_metrics": ["ndcg@5"], "n_permutations": 500},
    "joint": {"warmup_epochs": 1, "learning_rate": 1e-3, "ramp_steps": 0, "negative_pool": 8},
    "live": {"chunk": 16},
    "finetuning": {
        "epochs": 1,
        "batch_size": 16,
        "chunk_size": 16,
        "held_out_share": 0.2,
        "objectives": {"image_text": 0, "co_purchase": 1},
    },
    "seeds": [0, 1],
    "device": "cpu",
}
FREE = Costs(0, 0, 0, 0, 0, 0, "CPU")


def study(**changes: Any) -> ParadigmsConfig:
    return parse_config(STUDY | changes, ParadigmsConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paradigms": ["pretrained", "thawed"]}, r"paradigms\.1: Input should be 'specific', 'pretrained'"),
        ({"paradigms": ["joint"]}, "without pretrained, which every difference is against"),
        ({"paradigms": ["pretrained", "specific"], "specific": []}, "specific lists no encoders"),
        ({"recommenders": [{"model": "bpr"}]}, r"none of the recommenders reads features \(bpr\)"),
        ({"recommenders": [{"model": "itemknn_content"}]}, "itemknn_content has nothing to train"),
        ({"specific": [{"text": "tfidf"}]}, "specific lists encoders of text, and modalities are image and"),
        ({"encoders": ["random:8"]}, "random:8 encodes nothing"),
        ({"encoders": ["given"]}, "encoders lists given, which are vectors without an encoder"),
        ({"encoders": ["tiny", "tiny"]}, "encoders lists tiny 2 times"),
        ({"seeds": [1, 1]}, "seeds lists 1 2 times"),
        ({"reading": {"fuse": "concat"}}, r"reading\.fuse is 'concat'"),
        ({"training": {"epochs": 5, "monitor": "recall@5"}, "joint": {}}, r"joint\.warmup_epochs are 5"),
        ({"comparison": {"metric": "recall@7"}}, "'recall@7' is not measured"),
        ({"encoder": "tiny"}, "did you mean 'encoders'"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_the_door(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_what_joint_training_forbids_is_allowed_without_it() -> None:
    frozen = {"paradigms": ["pretrained", "finetuned"], "reading": {"fuse": "concat"}}
    assert study(**frozen, recommenders=[{"model": "itemknn_content"}]).readers[0].model == "itemknn_content"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": ["tfidf"]}, "tfidf encodes text, not image"),
        (
            {"encoders": ["tfidf"], "modalities": ["text"], "specific": []},
            "tfidf has no parameters, so that it cannot be finetuned or joint",
        ),
        ({"specific": [{"image": "tfidf", "text": "tiny"}]}, "tfidf encodes text, not image"),
        ({"encoders": ["tiny", "tiny+l2=no"]}, "would both be called tiny"),
    ],
)
def test_encoders_that_cannot_go_through_it_are_refused_before_anything_is_made(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_encoders(study(**changes), describe_encoder)


def test_recommenders_of_one_model_are_told_apart() -> None:
    given = [{"model": "vbpr", "settings": {"dim": 4}}, {"model": "freedom"}, {"model": "vbpr"}]
    assert [name for name, _ in named_apart(study(recommenders=given).readers)] == [
        "vbpr (1)",
        "freedom",
        "vbpr (3)",
    ]


def row(kind: Kind, values: list[float], *, encoder: str = "clip", valid: float = 0.5) -> Measured:
    mean = float(np.mean(values))
    return Measured(
        "vbpr", encoder, kind, (valid, valid), (mean - 0.1, mean + 0.1), np.array(values), FREE, 0
    )


def test_the_arithmetic_of_the_table() -> None:
    """Differences, references, intervals and one family, on numbers that a person can follow."""
    specific = row("specific", [0.0] * 12, encoder="resnet")
    weak = row("pretrained", [0.0] * 6 + [1.0] * 6, encoder="weak", valid=0.1)
    strong = row("pretrained", [1.0] * 12, valid=0.2)
    tuned = row("finetuned", [1.0] * 11 + [0.0])
    joint = row("joint", [0.0] * 12, encoder="weak")
    control = row("control", [0.0] * 12, encoder="random")
    floor = Measured("popularity", "", "floor", (0.1, 0.1), (0.5, 0.7), np.ones(12), FREE)
    config = ComparisonConfig(n_permutations=5000)
    table = make_table([floor, specific, weak, strong, tuned, joint, control], config)
    rows = {(one.measured.encoder, one.measured.kind): one for one in table.rows}
    assert rows["resnet", "specific"].against is strong  # the best on validation
    assert rows["random", "control"].against is weak  # the first encoder
    assert rows["clip", "finetuned"].against is strong
    assert rows["weak", "joint"].against is weak
    assert [one.against for one in table.rows if one.measured.kind in {"floor", "pretrained"}] == [None] * 3
    assert rows["clip", "finetuned"].result.difference.mean == pytest.approx(-1 / 12)
    assert rows["weak", "joint"].result.difference.mean == pytest.approx(-0.5)
    assert rows["", "floor"].sd == pytest.approx(0.2 / np.sqrt(2))
    better, helps, end_to_end = table.answers
    # Six users at (0 + 1) / 2 and six at 1, against 0: all twelve differ, so p is 2 / 2^12.
    assert better.result.difference.mean == pytest.approx(0.75)
    assert better.result.sign_flip.p_value == pytest.approx(2 / 2**12)
    assert (better.verdict, better.n_better, better.n_rows) == ("yes", 2, 2)
    assert (helps.verdict, helps.n_better, helps.n_rows) == ("not separated", 0, 1)
    assert end_to_end.result.difference.mean == pytest.approx(-0.5)
    # Two questions have one pair of rows each, whose test answers them and counts once.
    assert helps.result is rows["clip", "finetuned"].result
    tests = [*(one for one in table.rows if one.result is not None), better]
    assert len(tests) == 5
    adjusted = holm([one.result.sign_flip.p_value for one in tests])
    assert [one.p_holm for one in tests] == pytest.approx(adjusted.tolist())
    assert end_to_end.p_holm == rows["weak", "joint"].p_holm


def test_one_specific_row_answers_its_question_from_the_other_side() -> None:
    specific = row("specific", [0.0] * 8 + [1.0] * 4, encoder="resnet")
    table = make_table([specific, row("pretrained", [1.0] * 12)], ComparisonConfig(n_permutations=5000))
    of_row, answer = table.rows[0], table.answers[0]
    assert of_row.result.difference.mean == pytest.approx(-8 / 12)
    assert (answer.verdict, answer.p_holm) == ("yes", of_row.p_holm)
    shown, turned = of_row.result, answer.result
    assert (turned.mean_a, turned.mean_b) == (shown.mean_b, shown.mean_a)
    assert turned.difference.low == -shown.difference.high
    assert turned.difference.high == -shown.difference.low
    assert (turned.n_better, turned.n_worse) == (8, 0)


def test_a_paradigm_that_does_worse_is_a_no_and_one_that_is_not_there_was_not_asked() -> None:
    config = ComparisonConfig(n_permutations=5000)
    table = make_table([row("pretrained", [1.0] * 12), row("joint", [0.0] * 12)], config)
    assert [answer.verdict for answer in table.answers] == ["not asked", "not asked", "no"]
    lines = answer_lines(table)
    assert lines[0].endswith("Not asked: the study has no such rows.")
    assert "No, it does worse: recall@20 0.0000 against 1.0000, -1.0000" in lines[2]


def test_an_encoder_that_stayed_as_it_came_is_named() -> None:
    unmoved = Measured("vbpr", "clip", "finetuned", (0.5,), (0.5,), np.ones(4), FREE, n_unmoved=1)
    table = make_table([row("pretrained", [1.0] * 4), unmoved], ComparisonConfig())
    assert any(
        "left the encoder as it came: vbpr on clip finetuned (1 of 1 seeds)" in one for one in notes(table)
    )


@dataclass(frozen=True)
class Made:
    """A study that was run once."""

    store: Store
    result: ParadigmsResult

    def __getitem__(self, key: tuple[str, Kind]) -> Contender:
        recommender, kind = key
        return next(
            one for one in self.result.contenders if (one.recommender, one.kind) == (recommender, kind)
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("paradigms") / "store")
    return Made(store, run_paradigms(study(), PlainParadigmStages(store)))


def test_each_row_is_made_of_what_it_says(made: Made) -> None:
    shown = [(one.recommender, one.encoder, one.kind) for one in made.result.contenders]
    assert shown == [
        ("popularity", "", "floor"),
        ("bpr", "", "floor"),
        ("itemknn_content", "tiny", "floor"),
        ("vbpr", "tiny image, tfidf+dim=16 text", "specific"),
        ("vbpr", "tiny", "pretrained"),
        ("vbpr", "tiny", "finetuned"),
        ("vbpr", "tiny", "joint"),
        ("vbpr", "random", "control"),
        ("vbpr", "shuffled:tiny", "control"),
    ]
    for contender in made.result.contenders:
        assert [one.run.artefact.manifest.parameters["seed"] for one in contender.runs] == [0, 1]
    labels = {
        kind: made["vbpr", kind].runs[0].run.artefact.manifest.parameters["feature_set"]
        for kind in ("specific", "pretrained", "finetuned", "joint", "control")
    }
    assert labels == {
        "specific": "tiny image, tfidf-16 text",
        "pretrained": "tiny image+text",
        "finetuned": "tiny-finetuned image+text",
        "joint": "tiny-joint-vbpr image+text",
        "control": "random:96 image+text",
    }
    for kind in ("finetuned", "joint"):
        trained = [one.features.encoder.artefact for one in made["vbpr", kind].runs]
        assert [encoder.manifest.parameters["seed"] for encoder in trained] == [0, 1]
        for one in made["vbpr", kind].runs:
            read = {ref.key for ref in one.run.artefact.manifest.inputs}
            assert set(one.features.keys) < read
    assert made.result.comparison.summary["controlled"] is True


def test_all_rows_are_trained_with_the_same_settings(made: Made) -> None:
    shown = [
        {name: one.run.artefact.manifest.parameters[name] for name in ("settings", "training", "evaluation")}
        for contender in made.result.contenders
        if contender.recommender == "vbpr"
        for one in contender.runs
    ]
    assert len(shown) == 12
    assert all(one == shown[0] for one in shown)


def test_nothing_is_done_twice(made: Made) -> None:
    again = run_paradigms(study(), PlainParadigmStages(made.store))
    assert all(stage.reused for stage in again.stages)
    asked = [stage.artefact.ref for stage in made.result.stages if stage.artefact.kind != "features"]
    assert len(asked) == len(set(asked))


def test_one_fine_tuning_may_serve_all_seeds(made: Made) -> None:
    once = study(finetune_per_seed=False, paradigms=["pretrained", "finetuned"], controls=False, specific=[])
    result = run_paradigms(once, PlainParadigmStages(made.store))
    tuned = next(one for one in result.contenders if one.kind == "finetuned")
    first = made["vbpr", "finetuned"].runs[0].features.encoder.artefact.key
    assert [one.features.encoder.artefact.key for one in tuned.runs] == [first, first]
    assert [one.kind for one in result.contenders] == ["floor", "pretrained", "finetuned"]


def test_the_table_says_what_the_runs_measured(made: Made) -> None:
    config = study().comparison
    table = make_table([measure(one, "recall@5") for one in made.result.contenders], config)
    for contender, shown in zip(made.result.contenders, table.rows, strict=True):
        values = []
        for one in contender.runs:
            metrics = pl.read_parquet(one.run.artefact.path("metrics.parquet"))
            wanted = metrics.filter((pl.col("part") == "test") & (pl.col("metric") == "recall@5"))
            values.append(wanted["value"][0])
        assert list(shown.measured.test) == pytest.approx(values)
        assert shown.measured.per_user.mean() == pytest.approx(np.mean(values))
    text = to_markdown(table)
    assert text.count("| vbpr | tiny | joint |") == 2  # the table, and its costs
    assert len(to_json(table)["rows"]) == 9


def test_costs_are_those_of_everything_a_row_needs(made: Made) -> None:
    frozen, tuned, joint = (made["vbpr", kind] for kind in ("pretrained", "finetuned", "joint"))
    encoding = sum(one.artefact.manifest.seconds for one in frozen.runs[0].features.made)
    costs = costs_of(frozen.runs[:1])
    facts = frozen.runs[0].run.artefact.manifest.facts
    assert (costs.encode_s, costs.tune_s) == (pytest.approx(encoding), 0)
    assert costs.train_s == facts["train_seconds"]
    assert costs.seconds == pytest.approx(encoding + facts["train_seconds"])
    assert costs.device.startswith("CPU (")
    of_tuned = costs_of(tuned.runs[:1])
    encoder = tuned.runs[0].features.encoder.artefact.manifest
    assert of_tuned.tune_s == encoder.facts["finetune_seconds"]
    assert of_tuned.stored_bytes == encoder.bytes + sum(
        one.artefact.manifest.bytes for one in tuned.runs[0].features.made
    )
    of_joint = costs_of(joint.runs[:1])
    assert of_joint.encode_s > encoding  # the features it started from, and its own
    assert of_joint.tune_s == joint.runs[0].features.encoder.artefact.manifest.facts["train_seconds"]
    assert of_joint.train_s == 0
    of_features = [
        int(str(one.artefact.manifest.facts["peak_memory_bytes"])) for one in frozen.runs[0].features.made
    ]
    assert min(of_features) > 0
    assert costs.peak_bytes == max(facts["peak_memory_bytes"], *of_features)
    both = costs_of(frozen.runs)
    assert both.peak_bytes == max(costs_of([one]).peak_bytes for one in frozen.runs)
    assert both.train_s == pytest.approx(np.mean([costs_of([one]).train_s for one in frozen.runs]))


def test_settings_are_searched_once_and_joint_training_takes_the_frozen_choice(made: Made) -> None:
    searched = study(
        recommenders=[{"model": "vbpr"}],
        paradigms=["pretrained", "finetuned", "joint"],
        search={"n_trials": 2, "method": "random", "pruning": "none"},
        controls=False,
    )
    result = run_paradigms(searched, PlainParadigmStages(made.store))
    frozen, tuned, joint = result.contenders
    searches = {stage.artefact.key for stage in result.stages if stage.artefact.kind == "search"}
    assert len(searches) == 2  # of the frozen and the fine-tuned features
    assert frozen.runs[0].search.artefact.key == joint.runs[0].search.artefact.key
    assert costs_of(joint.runs).search_s > 0
    for contender in (frozen, tuned, joint):
        choice = best_choice(contender.runs[0].search.artefact)
        assert choice
        for one in contender.runs:
            shown = one.run.artefact.manifest.parameters
            used = {**shown["settings"], **{f"training.{k}": v for k, v in shown["training"].items()}}
            assert {name: used[name] for name in choice} == choice


def test_the_command_prints_and_writes_the_table(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / "study.yaml", tmp_path / "table.md"
    path.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    command = ["paradigms", str(path), "--store", made.store.url, "-o", str(written)]
    assert run_app(app, [*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["comparison"] == made.store.get("study", "comparison").ref
    assert shown["reused"] == shown["stages"]
    assert [one["answer"] for one in shown["answers"]].count("not asked") == 0
    assert written.read_text(encoding="utf-8").startswith("# Paradigms: test recall@5\n")
    assert run_app(app, command) == 0
    printed = capsys.readouterr().out
    assert "Does fine-tuning on the catalogue help?" in printed
    assert "Measured on CPU" in printed


def test_the_command_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"encoders": ["tfidf"]}), encoding="utf-8")
    assert run_app(app, ["paradigms", str(path), "--store", str(tmp_path / "store")]) == EXIT_USER_ERROR
    assert "tfidf encodes text, not image" in capsys.readouterr().err
    assert run_app(app, ["paradigms", str(tmp_path / "no.yaml")]) == EXIT_USER_ERROR


def test_what_is_asked_for_again_is_not_made_again_even_by_force() -> None:
    asked: list[tuple[str, str]] = []

    @dataclass(frozen=True)
    class Counting(PlainParadigmStages):
        def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
            asked.append((dataset, config.encoder))
            return StageResult(asked, reused=False)  # type: ignore[arg-type]

    told: list[StageResult] = []
    once = OnceStages(Counting(Store("memory://once"), force=True), told.append)
    for dataset, encoder in (("a", "tiny"), ("a", "tiny"), ("a", "tfidf"), ("b", "tiny")):
        once.extract(dataset, FeaturesConfig(encoder=encoder))
    assert asked == [("a", "tiny"), ("a", "tfidf"), ("b", "tiny")]
    assert len(told) == len(once.results) == 3


def test_joint_rows_may_train_side_networks_alone(made: Made) -> None:
    config = study(
        paradigms=["pretrained", "joint"],
        controls=False,
        specific=[],
        trained="side",
        side={"adapter_width": 8},
        seeds=[0],
    )
    result = run_paradigms(config, PlainParadigmStages(made.store))
    joint = next(one for one in result.contenders if one.kind == "joint")
    trained = joint.runs[0].features.encoder
    assert trained is not None
    assert trained.artefact.manifest.parameters["trained"] == "side"
    assert trained.artefact.manifest.parameters["side"]["adapter_width"] == 8
    whole = made["vbpr", "joint"].runs[0].features.encoder
    n_trained = [one.artefact.manifest.facts["n_trained"] for one in (trained, whole)]
    assert 0 < n_trained[0] < n_trained[1] / 4
