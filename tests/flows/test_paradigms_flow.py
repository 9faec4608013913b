"""The study of paradigms as a flow: its stages as subflows, its table in the UI, and reuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.paradigms import paradigms_flow
from flows.tasks import value_of
from pipeline.config import parse_config
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.settings import settings_text
from pipeline.store import Store
from tests.flows.test_flow_runs import recorded
from tests.pipeline.test_paradigms import STUDY

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow,
]
CONFIG = parse_config(
    STUDY
    | {
        "recommenders": [{"model": "vbpr", "settings": {"dim": 4}}],
        "specific": [],
        "controls": False,
        "seeds": [0],
    },
    ParadigmsConfig,
)


def test_a_study_is_run_shown_and_reused(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    states = [
        paradigms_flow(settings=settings_text(CONFIG), store=store.url, return_state=True) for _ in range(2)
    ]
    assert [state.name for state in states] == ["Completed", "Cached"]
    made = value_of(states[0])
    assert [one.kind for one in made.contenders] == ["pretrained", "finetuned", "joint"]
    assert made.comparison is not None
    assert store.get("study", "comparison").key == made.comparison.artefact.key
    run, _, artifacts = recorded(states[0])
    assert run.name == "study"
    shown = {artifact.key: artifact for artifact in artifacts}
    assert {"paradigms-study", "paradigms-study-rows"} <= set(shown)
    page = str(shown["paradigms-study"].data)
    assert "Does end-to-end training help?" in page
    assert "| vbpr | tiny | joint |" in page
    assert "Does fine-tuning on the catalogue help?" in str(shown["paradigms-study"].description)
    rows = str(shown["paradigms-study-rows"].data)
    assert rows.count('"paradigm"') + rows.count("'paradigm'") == 3


def test_a_mistake_ends_the_run_with_one_message(tmp_path: Path) -> None:
    wrong = CONFIG.model_copy(update={"encoders": ("tfidf",)})
    state = paradigms_flow(settings=settings_text(wrong), store=str(tmp_path / "shop"), return_state=True)
    assert state.is_failed()
    assert "tfidf encodes text, not image" in str(state.message)
