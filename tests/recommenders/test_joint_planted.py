"""A world whose signal frozen features lack: only an encoder that learns can rank items nobody has seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.joint import JointConfig, JointInput, train_jointly
from recommenders.live import LiveTable
from recommenders.models.base import Recommender
from recommenders.models.registry import build_model
from recommenders.training import TrainingConfig, train
from tests.recommenders.linear_encoder import LinearEncoder
from tests.recommenders.test_live import unit

N_USERS, N_ITEMS, N_COLD = 60, 160, 60
N_KINDS, NOISE = 3, 8
TRAINING = TrainingConfig(epochs=60, batch_size=256, learning_rate=0.02, patience=0, monitor="recall@20")
EVALUATION = EvaluationConfig(ks=(20,), candidates="cold")
SETTINGS = {"dim": 1, "content_dim": 8, "l2": 0.01, "l2_projection": 0.0}


class Planted:
    """Items of three kinds; a user likes one kind. Contents say the kind, which the encoder does not look at.

    The kind is three of eleven numbers; the encoder starts with zeros for these and reads noise. A third of
    the items has no training pair, so that interactions tell nothing of them.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        kinds = rng.integers(0, N_KINDS, N_ITEMS)
        contents = rng.standard_normal((N_ITEMS, N_KINDS + NOISE)).astype(np.float32)
        contents[:, :N_KINDS] = 2 * np.eye(N_KINDS, dtype=np.float32)[kinds]
        self.contents = {"image": torch.from_numpy(contents)}
        liked = rng.integers(0, N_KINDS, N_USERS)
        cold = np.arange(N_ITEMS) >= N_ITEMS - N_COLD
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}
        for user in range(N_USERS):
            own = np.flatnonzero(kinds == liked[user])
            warm, unseen = rng.permutation(own[~cold[own]]), rng.permutation(own[cold[own]])
            parts["train"] += [(user, int(item)) for item in warm[:15]]
            parts["valid"] += [(user, int(item)) for item in unseen[:5]]
            parts["test"] += [(user, int(item)) for item in unseen[5:12]]
        self.train, self.valid, self.test = (
            Interactions(*np.array(pairs).T, N_USERS, N_ITEMS) for pairs in parts.values()
        )

    def encoder(self) -> LinearEncoder:
        encoder = LinearEncoder(self.contents, width=6)
        with torch.no_grad():
            encoder.maps["image"][:N_KINDS] = 0.0
        return encoder

    def table(self, encoder: LinearEncoder) -> FeatureTable:
        vectors = encoder.encode_all("image", torch.arange(N_ITEMS))
        present = {"image": torch.ones(N_ITEMS, dtype=torch.bool)}
        return FeatureTable({"image": unit("image", vectors)}, present)

    def recall(self, model: Recommender, table: FeatureTable) -> float:
        model.eval()
        measured = evaluate(model.scorer(table), self.test, self.train, EVALUATION)
        return measured.metrics["recall@20"]


def two_stage(world: Planted, seed: int) -> float:
    table = world.table(world.encoder())
    model = build_model("vbpr", SETTINGS, world.train, table, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    train(model, world.train, world.valid, table, TRAINING, evaluation=EVALUATION, rng=rng)
    return world.recall(model, table)


def joint(world: Planted, seed: int) -> float:
    encoder = world.encoder()
    table = world.table(encoder)
    model = build_model("vbpr", SETTINGS, world.train, table, np.random.default_rng(seed))
    learning = JointConfig(warmup_epochs=5, learning_rate=0.05, ramp_steps=0, negative_pool=64)
    train_jointly(
        model,
        world.train,
        world.valid,
        JointInput(LiveTable(table, encoder, unit), encoder, learning),
        TRAINING,
        evaluation=EVALUATION,
        rng=np.random.default_rng(seed),
    )
    return world.recall(model, world.table(encoder))


def ceiling(world: Planted) -> float:
    """Recall@20 of lists that begin with all cold items of the kind a user likes."""
    found: Tensor = torch.from_numpy(np.bincount(world.test.user_rows, minlength=N_USERS))
    return float((found.clamp(max=20) / found).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_joint_training_solves_what_the_two_stage_way_cannot(seed: int) -> None:
    world = Planted(seed)
    chance = 20 / N_COLD
    frozen, learnt = two_stage(world, seed), joint(world, seed)
    assert frozen < 1.4 * chance, (frozen, chance)
    assert learnt > 0.8 * ceiling(world), (learnt, ceiling(world))
    assert learnt > 2 * frozen
