"""Searching settings as a flow: two workers beside each other, a choice, and a run that is made with it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from flows.search_recommender import run_inputs, search_recommender_flow
from flows.tasks import value_of
from flows.train_recommender import train_recommender_flow
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.settings import inputs_of
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.search_recommender import STUDY_FILE, SearchSettings
from pipeline.store import Store
from tests.flows.test_flow_runs import recorded

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow,
]
DEMO = DatasetConfig.model_validate({"demo": {"n_items": 40, "n_users": 60}})
CONFIG = parse_config(
    {
        "model": "bpr",
        "settings": {"dim": 4},
        "training": {"epochs": 2},
        "search": {"n_trials": 4, "method": "random", "pruning": "none"},
    },
    SearchSettings,
)
FORM = inputs_of(CONFIG, "model") | {"trials": 4}


def test_two_workers_search_and_a_run_is_made_with_their_choice(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    states = [
        search_recommender_flow(dataset, **FORM, workers=2, name="tuned", store=store.url, return_state=True)
        for _ in range(2)
    ]
    assert [state.name for state in states] == ["Completed", "Cached"]
    found = store.get("tuned", "search")
    assert len(pl.read_parquet(found.path(STUDY_FILE))) == 4
    run, _, artifacts = recorded(states[0])
    assert run.name == found.slug
    assert any("best valid recall@20" in str(artifact.data) for artifact in artifacts)
    trained = train_recommender_flow(
        dataset, **run_inputs(CONFIG.run()), search="tuned", store=store.url, return_state=True
    )
    assert found.as_input("settings") in store.get(value_of(trained)).manifest.inputs
