from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.joint import JointConfig, JointInput, train_jointly
from recommenders.live import LiveTable
from recommenders.models.registry import MODELS, build_model
from recommenders.training import TrainingConfig, TrainingResult, train
from tests.recommenders.linear_encoder import LinearEncoder
from tests.recommenders.test_live import N_ITEMS, N_USERS, contents, table_of, unit
from tests.worlds import random_world

WORLD = random_world(n_users=N_USERS, n_items=N_ITEMS, density=0.4)
EVALUATION = EvaluationConfig(ks=(5,))
TRAINING = TrainingConfig(
    epochs=6, batch_size=8, learning_rate=0.05, patience=0, monitor="recall@5", optimizer="sgd"
)
JOINT = JointConfig(warmup_epochs=2, learning_rate=0.01, ramp_steps=3, negative_pool=4)
LISTENS = sorted(
    name for name, entry in MODELS.items() if entry.model.needs_features and name != "itemknn_content"
)
SMALL: dict[str, dict[str, Any]] = {
    name: {"dim": 4} if "dim" in MODELS[name].config.model_fields else {} for name in MODELS
}


class Trained:
    """One joint training, from the same start each time."""

    def __init__(
        self,
        name: str = "freedom",
        *,
        config: TrainingConfig = TRAINING,
        joint: JointConfig = JOINT,
        folder: Path | None = None,
        **run: Any,
    ) -> None:
        self.encoder = LinearEncoder(contents())
        self.before = self.encoder.state()
        table = table_of(self.encoder, absent=(5,))
        settings = SMALL[name] | ({"k": 3} if "k" in MODELS[name].config.model_fields else {})
        train_pairs = WORLD.split.train
        self.model = build_model(name, settings, train_pairs, table, np.random.default_rng(0))
        self.live = LiveTable(table, self.encoder, unit)
        self.result: TrainingResult = train_jointly(
            self.model,
            train_pairs,
            WORLD.split.valid,
            JointInput(self.live, self.encoder, joint),
            config,
            evaluation=EVALUATION,
            rng=np.random.default_rng(1),
            checkpoint_folder=folder,
            **run,
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.model.state_dict(), **self.encoder.state()}


def until(n_epochs: int, rows: list[dict[str, float]]) -> Callable[[dict[str, float]], bool]:
    """Keeps the rows, and ends the training after some epochs."""
    return lambda row: rows.append(row) or len(rows) == n_epochs  # type: ignore[func-returns-value]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", LISTENS)
def test_every_recommender_that_listens_moves_its_encoder(name: str) -> None:
    trained = Trained(name, joint=JOINT.model_copy(update={"warmup_epochs": 0}))
    assert len(trained.result.history) == 6
    best = trained.encoder.state()
    last = trained.live.table().vectors
    first = table_of(LinearEncoder(contents()), absent=(5,)).vectors
    assert all(np.isfinite(row["loss"]) for row in trained.result.history)
    for modality in ("image", "text"):
        norms = [row[f"gradient_norm_{modality}"] for row in trained.result.history]
        assert max(norms) > 0, norms
        assert not torch.equal(best[f"maps.{modality}"], trained.before[f"maps.{modality}"])
        assert not torch.equal(last[modality], first[modality])
    assert not last["image"][5].any()


def test_the_warm_up_is_ordinary_training_and_leaves_the_encoder_alone() -> None:
    config = TRAINING.model_copy(update={"epochs": 3})
    joint = JointConfig(warmup_epochs=2, negative_pool=0, refresh="never")
    rows: list[dict[str, float]] = []
    trained = Trained(
        "vbpr", config=config, joint=joint, watch=lambda row: rows.append(row) or len(rows) == 2
    )
    assert_same(trained.encoder.state(), trained.before)
    table = table_of(trained.encoder, absent=(5,))
    model = build_model("vbpr", SMALL["vbpr"], WORLD.split.train, table, np.random.default_rng(0))
    plain = train(
        model,
        WORLD.split.train,
        WORLD.split.valid,
        table,
        config.model_copy(update={"epochs": 2}),
        evaluation=EVALUATION,
        rng=np.random.default_rng(1),
    )
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain.history]
    assert [row["joint"] for row in rows] == [0.0, 0.0]
    assert_same(trained.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["freedom", "lattice", "slmrec"])
@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_killed_and_resumed_equals_uninterrupted(name: str, stop_after: int, tmp_path: Path) -> None:
    whole = Trained(name, config=TRAINING.model_copy(update={"optimizer": "adam"}))
    config = TRAINING.model_copy(update={"optimizer": "adam"})
    seen: list[dict[str, float]] = []
    Trained(
        name, config=config, folder=tmp_path, watch=lambda row: seen.append(row) or len(seen) == stop_after
    )
    resumed = Trained(name, config=config, folder=tmp_path)
    assert resumed.result.resumed_after == stop_after
    assert resumed.result.best_epoch == whole.result.best_epoch
    assert_same(resumed.state(), whole.state())
    for key in ("loss", "valid_recall@5"):
        assert [row[key] for row in resumed.result.history] == [row[key] for row in whole.result.history]
    for modality, table in whole.live.table().vectors.items():
        assert torch.equal(resumed.live.table().vectors[modality], table)


def test_another_encoder_setting_is_another_training(tmp_path: Path) -> None:
    Trained(folder=tmp_path, watch=lambda _: True)
    with pytest.raises(TrainingError, match="other joint settings"):
        Trained(folder=tmp_path, joint=JOINT.model_copy(update={"learning_rate": 0.02}))


def test_model_and_encoder_are_left_at_the_best_epoch() -> None:
    states: list[dict[str, torch.Tensor]] = []
    made: list[Trained] = []

    class Watching(Trained):
        def __init__(self) -> None:
            made.append(self)
            super().__init__(watch=lambda _: states.append(self_state()) or False)

    def self_state() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in made[0].encoder.state().items()}

    trained = Watching()
    assert_same(trained.encoder.state(), states[trained.result.best_epoch - 1])


@pytest.mark.parametrize(("name", "is_encoded"), [("vbpr", True), ("bm3", False)])
def test_negatives_that_no_loss_reads_are_not_encoded(
    name: str, is_encoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[int]] = []
    step = LiveTable.step

    def watching(self: LiveTable, items: torch.Tensor, *rest: Any) -> torch.Tensor:
        encoded.append(items.tolist())
        return step(self, items, *rest)

    monkeypatch.setattr(LiveTable, "step", watching)
    one_batch = TRAINING.model_copy(update={"epochs": 1, "batch_size": len(WORLD.split.train)})
    Trained(name, config=one_batch, joint=JointConfig(warmup_epochs=0))
    positives = set(WORLD.split.train.item_rows.tolist())
    assert len(encoded) == 1
    assert (set(encoded[0]) > positives) == is_encoded
    assert (set(encoded[0]) == positives) != is_encoded


def test_refreshing_encodes_all_items_when_it_should() -> None:
    def n_encoded(**changes: Any) -> list[int]:
        counts: list[int] = []
        trained = LinearEncoder.encode_all

        def counting(self: LinearEncoder, modality: str, rows: torch.Tensor) -> torch.Tensor:
            counts.append(len(rows))
            return trained(self, modality, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearEncoder, "encode_all", counting)
            Trained(joint=JOINT.model_copy(update=changes))
        return counts

    assert n_encoded(refresh="never") == []
    assert n_encoded(refresh="epoch") == [N_ITEMS - 1, N_ITEMS] * 4  # both modalities, four joint epochs
    n_steps = 4 * -(-len(WORLD.split.train.user_rows) // TRAINING.batch_size)
    assert len(n_encoded(refresh="steps", refresh_steps=3)) == 2 * (n_steps // 3)


def test_the_contrast_pulls_each_picture_to_its_own_text() -> None:
    def agreement(weight: float) -> float:
        config = TRAINING.model_copy(update={"epochs": 20})
        joint = JOINT.model_copy(
            update={"contrast_weight": weight, "warmup_epochs": 0, "learning_rate": 0.02}
        )
        vectors = Trained("vbpr", config=config, joint=joint).live.table().vectors
        products = vectors["image"] @ vectors["text"].T
        return float((products.diagonal() - products.mean(dim=1)).mean())

    assert agreement(3.0) > agreement(0.0) + 0.1


@pytest.mark.parametrize(
    ("name", "training", "joint", "message"),
    [
        ("lightgcn", {}, {}, "LightGcn reads no features"),
        ("itemknn_content", {}, {}, "has nothing to train"),
        ("freedom", {"epochs": 2}, {}, "nothing would be trained jointly"),
        ("freedom", {"amp": "bf16"}, {}, "training.amp and training.compile"),
        ("freedom", {"negatives": "popularity"}, {}, "a pool is drawn uniformly"),
        ("freedom", {"monitor": "recall@7"}, {}, "training.monitor is 'recall@7'"),
    ],
)
def test_what_cannot_be_trained_jointly_is_refused(
    name: str, training: dict[str, Any], joint: dict[str, Any], message: str
) -> None:
    config = TrainingConfig.model_validate(TRAINING.model_dump() | training)
    encoder = LinearEncoder(contents())
    table = table_of(encoder)
    features = table if MODELS[name].model.needs_features else FeatureTable()
    model = build_model(name, {}, WORLD.split.train, features, np.random.default_rng(0))
    with pytest.raises(TrainingError, match=message):
        train_jointly(
            model,
            WORLD.split.train,
            WORLD.split.valid,
            JointInput(LiveTable(table, encoder, unit), encoder, JOINT.model_copy(update=joint)),
            config,
            evaluation=EVALUATION,
            rng=np.random.default_rng(0),
        )
