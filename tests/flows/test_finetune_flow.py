"""Fine-tuning as a flow: an encoder with its history, found again, and encoded with."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.extract_features import extract_features_flow
from flows.finetune_encoder import finetune_encoder_flow
from flows.history import history_rows
from flows.tasks import value_of
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.settings import inputs_of
from pipeline.stages.finetune_encoder import FinetuneSettings
from pipeline.stages.prepare_dataset import prepare_dataset
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
        "finetuning": {
            "epochs": 2,
            "batch_size": 8,
            "chunk_size": 8,
            "held_out_share": 0.2,
            "patience": 0,
            "objectives": {"image_text": 1.0, "co_purchase": 0.5},
        },
        "device": "cpu",
    },
    FinetuneSettings,
)
FORM = inputs_of(CONFIG, "encoder", "seed")


def test_an_encoder_is_tuned_shown_reused_and_encoded_with(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    states = [
        finetune_encoder_flow(dataset, **FORM, name="mine", store=store.url, return_state=True)
        for _ in range(2)
    ]
    assert [state.name for state in states] == ["Completed", "Cached"]
    encoder = store.get("mine", "encoder")
    assert value_of(states[0]) == encoder.ref
    run, _, artifacts = recorded(states[0])
    assert run.name == encoder.slug
    keys = {artifact.key: artifact for artifact in artifacts}
    page = "finetune-encoder-tiny-finetuned"
    assert set(keys) == {
        page,
        f"{page}-figures",
        f"{page}-history",
        f"{page}-history-curves",
        f"{page}-link",
        "finetune-encoder-progress",
    }
    shown = str(keys["finetune-encoder-tiny-finetuned-history"].data)
    drawn = str(keys[f"{page}-history-curves"].data)
    assert 'title "gradient norm image text"' in drawn
    assert 'title "retrieval"' in drawn
    rows = history_rows(encoder)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for name in ("loss_co_purchase", "gradient_norm_image_text", "retrieval"):
        assert str(rows[2][name]) in shown
    what = {"encoder": "store/mine", "modality": "image", "settings": "device: cpu"}
    extracted = extract_features_flow(dataset, **what, store=store.url, return_state=True)
    assert encoder.as_input("encoder") in store.get(value_of(extracted)).manifest.inputs


def test_a_mistake_ends_the_run_with_one_message(tmp_path: Path) -> None:
    store = Store(tmp_path / "shop")
    dataset = prepare_dataset(store, DEMO).artefact.ref
    wrong = FORM | {"encoder": "random"}
    state = finetune_encoder_flow(dataset, **wrong, store=store.url, return_state=True)
    assert state.is_failed()
    assert "no parameters to train" in str(state.message)
