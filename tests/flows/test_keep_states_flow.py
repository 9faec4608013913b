"""States of a frozen encoder in the flow of joint training: a subflow, and cached for the next seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.joint_training import joint_inputs, joint_training_flow, keep_states_flow
from flows.tasks import CACHED, value_of
from pipeline.config import parse_config
from pipeline.joint_way import JointWayConfig
from pipeline.stages.keep_states import StatesConfig
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Store
from tests.flows.test_flow_runs import recorded
from tests.flows.test_joint_flow import DEMO, RAW

pytestmark = [
    pytest.mark.prefect,
    pytest.mark.xdist_group("prefect"),
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow,
]


def config(seed: int) -> JointWayConfig:
    raw: dict[str, Any] = RAW | {"tuning": {"mode": "last-n", "last_n": 1}, "seed": seed}
    return parse_config(raw, JointWayConfig)


def test_states_are_a_stage_of_the_flow_and_cached_for_the_next_seed(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    first, second = (
        value_of(
            joint_training_flow(dataset, **joint_inputs(config(seed)), store=store.url, return_state=True)
        )
        for seed in (0, 1)
    )
    assert [stage.reused for stage in first.all()] == [False] * 6
    assert [stage.reused for stage in second.states] == [True]
    assert second.states[0].artefact.key == first.states[0].artefact.key
    assert second.encoder is not None
    assert not second.encoder.reused
    assert second.states[0].artefact.as_input("text states") in second.encoder.artefact.manifest.inputs
    wanted = StatesConfig(encoder="tiny", modality="text", above=1, device="cpu")
    state = keep_states_flow(dataset, config=wanted, store=store.url, return_state=True)
    assert state.name == CACHED
    assert "reused" in recorded(state)[0].tags
    assert value_of(state) == first.states[0].artefact.ref
