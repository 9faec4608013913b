"""Joint training as a flow: subflows, their history, reuse, and a cancelled run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.history import history_rows
from flows.joint_training import joint_inputs, joint_training_flow
from flows.tasks import value_of
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.joint_way import JointWayConfig
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Store
from recommenders.joint import TrainingLoop
from tests.flows.test_flow_runs import recorded

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow,
]
DEMO = DatasetConfig.model_validate({"demo": {"n_items": 40, "n_users": 60}})
RAW: dict[str, Any] = {
    "model": "freedom",
    "settings": {"k": 3},
    "modalities": ["text"],
    "device": "cpu",
    "training": {"epochs": 3, "batch_size": 256, "learning_rate": 0.01, "patience": 0},
    "joint": {"warmup_epochs": 1, "learning_rate": 1e-3, "negative_pool": 8},
}
FORM = joint_inputs(parse_config(RAW, JointWayConfig))


def test_a_run_leaves_all_artefacts_a_history_and_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    states = [
        joint_training_flow(dataset, **FORM, name="mine", store=store.url, return_state=True)
        for _ in range(2)
    ]
    assert [state.name for state in states] == ["Completed", "Cached"]
    result = value_of(states[0])
    assert result.encoder is not None
    assert result.run is not None
    encoder = store.get("mine", "encoder")
    assert encoder.key == result.encoder.artefact.key
    assert encoder.as_input("encoder") in result.run.artefact.manifest.inputs
    rows = history_rows(encoder)
    assert [row["joint"] for row in rows] == [False, True, True]
    assert all(row["gradient_norm_text"] is not None for row in rows[1:])
    drawn = artifact_of(f"train-jointly-{encoder.slug}-history-curves")
    assert 'title "gradient norm text"' in drawn
    assert 'title "valid recall@20"' in drawn
    subflows = [each for each in result.all() if not each.reused]
    assert len(subflows) == 5  # features, encoder, its features, the run, its index
    assert recorded(states[0])[0].name


def artifact_of(key: str) -> str:
    """What the server shows under a key, whichever run left it last."""
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=1)
    return str(found[0].data)


def test_a_cancelled_run_goes_on_from_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    save = TrainingLoop.save

    def cancelled_after_two(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", cancelled_after_two)
        with pytest.raises(KeyboardInterrupt):
            joint_training_flow(dataset, **FORM, store=store.url)
    state = joint_training_flow(dataset, **FORM, store=store.url, return_state=True)
    result = value_of(state)
    assert result.encoder is not None
    assert result.encoder.artefact.manifest.facts["resumed_after"] == 2


def test_a_mistake_ends_the_run_with_one_message(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    wrong = joint_inputs(parse_config(RAW | {"model": "bpr", "settings": {}}, JointWayConfig))
    state = joint_training_flow(dataset, **wrong, store=store.url, return_state=True)
    assert state.is_failed()
    assert "bpr reads no features" in str(state.message)
