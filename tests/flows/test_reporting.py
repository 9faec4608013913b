from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import httpx
import pytest

from flows import reporting
from pipeline.progress import SILENT, Progress
from pipeline.stages.result import StageResult
from pipeline.store import Store
from tests.flows.dummy import toy_stage


@pytest.fixture
def result(tmp_path: Path) -> StageResult:
    return toy_stage(Store(tmp_path / "shop"), "blue", SILENT)


class Terminal:
    """Keeps what a terminal would show."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[tuple[int, int]] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def progress(self, description: str) -> Iterator[Progress]:
        yield lambda done, total: self.shown.append((done, total))


class Artifacts:
    """Stands in for Prefect's artifact functions."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []

    def create(self, progress: float, **details: Any) -> str:
        self.made.append(("create", {"progress": progress, **details}))
        return "the-id"

    def update(self, artifact: str, **details: Any) -> None:
        assert artifact == "the-id"
        self.made.append(("update", details))


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    import logging

    made = Artifacts()
    monkeypatch.setattr(reporting, "create_progress_artifact", made.create)
    monkeypatch.setattr(reporting, "update_progress_artifact", made.update)
    monkeypatch.setattr(reporting, "get_run_logger", lambda: logging.getLogger("run"))
    return made


def test_words_go_to_the_run_s_log_and_to_the_terminal(
    artifacts: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    token = reporting.TERMINAL.set(terminal)
    try:
        with caplog.at_level("INFO", logger="run"):
            reporting.PrefectReporter("toy").say("  two items without a picture")
    finally:
        reporting.TERMINAL.reset(token)
    assert terminal.said == ["  two items without a picture"]
    assert caplog.messages == ["two items without a picture"]


def test_progress_is_sent_seldom_and_ends_at_a_hundred(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([10.0, 10.5, 11.9, 12.1, 12.2])
    monkeypatch.setattr(reporting, "monotonic", lambda: next(seconds))
    with reporting.PrefectReporter("Extract Features").progress("encoding") as progress:
        for done in range(1, 6):
            progress(done * 1000, 5000)
    assert artifacts.made == [
        (
            "create",
            {"progress": 20.0, "key": "extract-features-progress", "description": "encoding: 1,000 of 5,000"},
        ),
        ("update", {"progress": 80.0, "description": "encoding: 4,000 of 5,000"}),
        ("update", {"progress": 100.0, "description": "encoding: done"}),
    ]


def test_a_server_that_does_not_answer_does_not_end_the_work(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **details: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(reporting, "create_progress_artifact", refuse)
    with reporting.PrefectReporter("toy").progress("encoding") as progress:
        progress(1, 2)
    assert caplog.messages == ["The server did not take the progress (refused); the work goes on."]


def test_progress_of_unknown_length_counts(artifacts: Artifacts) -> None:
    with reporting.PrefectReporter("toy").progress("epochs") as progress:
        progress(7, 0)
    assert artifacts.made[0][1]["description"] == "epochs: 7"
    assert artifacts.made[0][1]["progress"] == 0.0


def test_without_progress_there_is_no_artifact(artifacts: Artifacts) -> None:
    with reporting.PrefectReporter("toy").progress("nothing to do"):
        pass
    assert artifacts.made == []


def test_a_failed_task_does_not_show_as_done(artifacts: Artifacts) -> None:
    def fail_half_way() -> None:
        with reporting.PrefectReporter("toy").progress("encoding") as progress:
            progress(1, 2)
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert [kind for kind, _ in artifacts.made] == ["create"]


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        (("extract-features", "open_clip/ViT-B-32:openai"), "extract-features-open-clip-vit-b-32-openai"),
        (("Two Stage", "--x--"), "two-stage-x"),
    ],
)
def test_a_key_has_only_what_prefect_takes(parts: tuple[str, ...], key: str) -> None:
    assert reporting.artifact_key(*parts) == key


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (1234567, "1,234,567"), (True, "True"), ("flat", "flat")]
)
def test_figures_are_short(value: object, text: str) -> None:
    assert reporting.short(value) == text


def test_the_headline_tells_reuse_and_the_numbers(result: StageResult, tmp_path: Path) -> None:
    assert reporting.headline(result).endswith(" s · letters 4, share 0.1235")
    again = toy_stage(Store(tmp_path / "shop"), "blue", SILENT)
    assert reporting.headline(again) == "reused · letters 4, share 0.1235"


def test_the_page_names_the_artefact_its_figures_and_what_comes_next(
    result: StageResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "deployment_id", lambda flow: {"extract-features": "42"}.get(flow, ""))
    monkeypatch.setattr(reporting, "ui_url", lambda: "http://127.0.0.1:4200")
    steps = [
        reporting.NextStep("Extract", "extract-features", {"dataset": result.artefact.ref}),
        reporting.NextStep("Not served", "joint", {}),
    ]
    page = reporting.result_page("toy", result, steps)
    assert "# toy: blue" in page
    assert "| share | 0.1235 |" in page
    assert result.artefact.key in page
    assert "[Extract](http://127.0.0.1:4200/v2/deployments/deployment/42/run?parameters=" in page
    assert "Not served" not in page


def test_the_link_to_the_next_form_carries_the_parameters(
    result: StageResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "deployment_id", lambda flow: "42")
    monkeypatch.setattr(reporting, "ui_url", lambda: "http://127.0.0.1:4200")
    parameters = {"dataset": "dataset/a b-0123456789ab", "store": ""}
    url = urlparse(reporting.NextStep("Extract", "extract-features", parameters).url())
    assert json.loads(parse_qs(url.query)["parameters"][0]) == parameters


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert reporting.markdown_table(("a",), [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"
