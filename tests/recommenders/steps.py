"""Real training steps whose batches are on record, for comparison with the plain loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from recommenders.evaluation import EvaluationConfig
from recommenders.models.base import Recommender
from recommenders.sampling import Batch, TrainingPairs
from recommenders.training import TrainingConfig, train
from tests.references.plain_bpr import PlainBatch
from tests.worlds import World


def train_two_steps(
    model: Recommender,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    *,
    learning_rate: float,
    n_negatives: int = 2,
) -> tuple[list[PlainBatch], list[float]]:
    """Train one epoch of two SGD steps through ``train``; return its batches and the loss of each."""
    seen: list[Batch] = []
    drawn = TrainingPairs.epoch
    n_train = len(world.split.train)

    def recorded(self, *args, **kwargs):
        for batch in drawn(self, *args, **kwargs):
            seen.append(batch)
            yield batch

    losses: list[float] = []
    loss_of = type(model).loss

    def noted(self, *args, **kwargs):
        loss = loss_of(self, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(TrainingPairs, "epoch", recorded)
        patch.setattr(type(model), "loss", noted)
        config = TrainingConfig(
            epochs=1,
            batch_size=n_train // 2 + 1,
            learning_rate=learning_rate,
            optimizer="sgd",
            n_negatives=n_negatives,
        )
        result = train(
            model,
            world.split.train,
            world.split.valid,
            world.features,
            config,
            evaluation=EvaluationConfig(ks=(20,)),
            rng=np.random.default_rng(3),
        )
    assert [len(batch.users) for batch in seen] == [n_train // 2 + 1, n_train - n_train // 2 - 1]
    sizes = [len(batch.users) for batch in seen]
    assert result.history[0]["loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)
    return [(b.users.numpy(), b.positives.numpy(), b.negatives.numpy()) for b in seen], losses


def as_float64(model: Recommender) -> dict[str, np.ndarray]:
    """Return copies of all parameters in float64, by name."""
    with torch.no_grad():
        return {
            name: copy.deepcopy(value.detach().numpy().astype(np.float64))
            for name, value in model.named_parameters()
        }
