"""The command line: a person reads lines, a program reads JSON, a mistake is one message and status 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from flows.cli import app
from pipeline.console import EXIT_INTERRUPTED, EXIT_USER_ERROR, human_bytes, run_app
from tests.pipeline.small_runs import SMALL_DATASET, SMALL_RUN


class Shell:
    """Runs commands in this process on one store."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self.capsys = store, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = run_app(app, [*arguments, "--store", str(self.store)])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def json(self, *arguments: str) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "store"


@pytest.fixture
def shell(store_folder: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(store_folder, capsys)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "run.yaml").write_text(yaml.safe_dump(SMALL_RUN))
    (folder / "dataset.yaml").write_text(yaml.safe_dump(SMALL_DATASET))
    return folder


def test_run_prints_the_comparison_and_reuses_everything_the_second_time(shell: Shell, configs: Path) -> None:
    code, out, _ = shell("run", str(configs / "run.yaml"), "--no-prefect")
    assert code == 0
    assert "Best on validation: " in out
    assert "Uncontrolled" in out
    again = shell.json("run", str(configs / "run.yaml"), "--no-prefect")
    assert again["reused"] == len(again["stages"])
    assert all(stage["reused"] for stage in again["stages"])


def test_stage_by_stage_leads_to_the_same_artefacts(shell: Shell, configs: Path, tmp_path: Path) -> None:
    whole = shell.json("run", str(configs / "run.yaml"), "--no-prefect")
    data = shell.json("dataset", str(configs / "dataset.yaml"), "--name", "small-data")
    image, text = (
        shell.json("extract", "small-data", "--encoder", "random:8", "--modality", modality)
        for modality in ("image", "text")
    )
    settings = ["--set", "settings.dim=4", "--set", "training.epochs=2", "--set", "training.monitor=recall@5"]
    run = shell.json(
        "train",
        "small-data",
        "-f",
        image["ref"],
        "-f",
        text["ref"],
        "--seed",
        "1",
        *settings,
        "--set",
        "evaluation.ks=[5, 10]",
    )
    refs = {stage["ref"] for stage in whole["stages"]}
    assert {data["ref"], image["ref"], text["ref"], run["ref"]} <= refs
    index = shell.json("index", image["ref"], "--set", "kind=flat")
    assert index["summary"]["kind"] == "flat"
    hits = shell.json("similar", index["ref"], "--item", "item-00001", "-k", "2")
    assert [hit["rank"] for hit in hits] == [1, 2]
    output = tmp_path / "top.parquet"
    assert shell.json("recommend", run["ref"], "-o", str(output), "-k", "3")["users"] == 30
    assert pl.read_parquet(output)["rank"].max() == 3
    exported = shell.json("export", image["ref"], "-o", str(tmp_path / "v.npy"), "--format", "npy")
    assert exported["dim"] == 8
    others = [stage["ref"] for stage in whole["stages"] if stage["kind"] == "run"]
    compared = shell.json(
        "compare", *others, "--name", "all", "--set", "metric=recall@5", "--set", "more_metrics=[ndcg@5]"
    )
    assert compared["summary"]["runs"] == 14


def test_the_store_is_listed_shown_named_verified_and_collected(shell: Shell, configs: Path) -> None:
    shell("run", str(configs / "run.yaml"), "--no-prefect")
    listed = shell.json("ls", "dataset")
    assert len(listed) == 1
    ref = listed[0]["ref"]
    assert shell.json("name", "films", ref) == {"name": "films", "ref": ref}
    assert "films" in shell.json("ls", "dataset")[0]["names"]
    shown = shell.json("show", "films")
    assert shown["facts"]["summary"]["items"] == 40
    code, out, _ = shell("show", "films")
    assert code == 0
    assert "split.seed" in out
    assert shell.json("verify")["problems"] == []
    kept = shell.json("gc", "--older-than-days", "0")
    assert kept["dry_run"] is True
    assert ref in kept["kept"]
    shell("name", "films")
    assert "films" not in shell.json("ls", "dataset")[0]["names"]


def test_verify_exits_with_1_when_a_file_is_damaged(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(tmp_path / "store", capsys)
    shell("dataset", str(configs / "dataset.yaml"))
    file = next((tmp_path / "store" / "dataset").glob("*/items.parquet"))
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    code, out, _ = shell("verify")
    assert code == 1
    assert "items.parquet" in out


def test_lists_of_encoders_and_recommenders_count_what_the_store_holds(shell: Shell, configs: Path) -> None:
    shell("run", str(configs / "run.yaml"), "--no-prefect")
    encoders = {row["spec"]: row["cached"] for row in shell.json("encoders")["forms"]}
    assert encoders["random:8"] == 2
    assert "tiny" in encoders
    vbpr = next(row for row in shell.json("recommenders") if row["model"] == "vbpr")
    assert vbpr["reads"] == "features"
    assert vbpr["runs"] == 6
    assert (vbpr["paper"], vbpr["year"]) == ("He and McAuley, AAAI 2016", 2016)
    assert vbpr["settings"]["dim"] == 64


def test_one_recommender_is_shown_with_every_setting_and_its_range(shell: Shell) -> None:
    bpr = shell.json("recommenders", "bpr")
    assert (bpr["venue"], bpr["year"], bpr["reads"]) == ("UAI", 2009, "interactions")
    settings = {setting["setting"]: setting for setting in bpr["settings"]}
    assert settings["l2"]["default"] == 0.05
    assert settings["l2"]["search"][0] == 2.0
    assert settings["loss"]["one_of"] == ["bpr", "softmax", "bce", "directau"]
    assert settings["training.learning_rate"]["search"] == [0.0001, 0.0005, 0.001, 0.005]
    assert all(setting["description"] for setting in bpr["settings"])
    code, out, _ = shell("recommenders", "itemknn")
    assert code == 0
    assert "Searched: 5 to 1000." in " ".join(out.split())
    code, _, err = shell("recommenders", "bprr")
    assert code == 2
    assert "Did you mean 'bpr'" in err


def test_doctor_names_every_topic(shell: Shell) -> None:
    assert set(shell.json("doctor")) == {"machine", "device", "faiss", "versions", "store", "prefect"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.yaml", "--no-prefect"), "There is no configuration file nowhere.yaml"),
        (("show", "nothing-like-it"), "is not in the store"),
        (("ls", "feature"), "There is no kind 'feature'"),
        (("dataset", "--set", "demo.n_itmes=3"), "did you mean 'n_items'"),
        (("train", "nothing", "--model", "vbprr"), "Did you mean 'vbpr'"),
        (("demo", "--set", "seeds=[]"), "seeds"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    shell: Shell, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = shell(*arguments)
    assert code == EXIT_USER_ERROR
    assert message in err
    assert "Traceback" not in err + out
    code, out, _ = shell(*arguments, "--json")
    assert code == EXIT_USER_ERROR
    assert message in json.loads(out)["error"]


def test_an_unknown_option_is_told_by_the_parser(shell: Shell) -> None:
    code, _, err = shell("ls", "--shop")
    assert code == EXIT_USER_ERROR
    assert "--shop" in err


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next command end with this error."""

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.cli_store.open_store", failing)


def test_ctrl_c_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, shell: Shell) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    code, _, err = shell("ls")
    assert code == EXIT_INTERRUPTED
    assert "the same command goes on" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it."),
        RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_too_little_memory_says_which_settings_need_less(
    error: Exception, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    fail_with(error, monkeypatch)
    code, _, err = shell("ls")
    assert code == EXIT_USER_ERROR
    assert "out of memory" in err
    assert "live.activations_mb" in err
    assert "More of it" not in err


def test_torch_words_a_lack_of_memory_as_is_looked_for(monkeypatch: pytest.MonkeyPatch, shell: Shell) -> None:
    def greedy(*_: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("pipeline.cli_store.open_store", greedy)
    code, _, err = shell("ls")
    assert code == EXIT_USER_ERROR
    assert "out of memory" in err


def test_other_errors_of_a_program_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, shell: Shell) -> None:
    fail_with(RuntimeError("a shape is wrong"), monkeypatch)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        shell("ls")


def test_every_command_takes_store_and_json() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        parameters = command.callback.__annotations__
        assert {"store", "json"} <= set(parameters), command.callback.__name__


def test_bytes_are_told_with_a_unit() -> None:
    assert [human_bytes(n) for n in (12, 1500, 2_000_000, 3e9, 4e12)] == [
        "12 B",
        "1.5 kB",
        "2.0 MB",
        "3.0 GB",
        "4.0 TB",
    ]
