"""Tiny trainings, shared by the tests of the loop and of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from recommenders import training_loop
from recommenders.evaluation import Evaluation, EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.models.base import Recommender
from recommenders.models.vbpr import Vbpr, VbprConfig
from recommenders.sampling import Batch
from recommenders.training import TrainingConfig, TrainingResult, train
from tests.worlds import World

EVALUATION = EvaluationConfig(ks=(5, 20))
FAST = TrainingConfig(epochs=6, batch_size=16, learning_rate=0.05, patience=0)


class KilledError(Exception):
    """Stands for the end of the process."""


class DropoutVbpr(Vbpr):
    """A model that draws numbers of its own while it trains."""

    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        dropped = {name: torch.dropout(x, 0.5, self.training) for name, x in features.vectors.items()}
        return super().loss(batch, FeatureTable(dropped, features.present))


def vbpr(world: World, kind: type[Vbpr] = Vbpr, seed: int = 0) -> Vbpr:
    config = VbprConfig(dim=4, content_dim=3)
    return kind(world.split.train, world.features, config, np.random.default_rng(seed))


def run(
    model: Recommender, world: World, config: TrainingConfig = FAST, folder: Path | None = None, **kwargs
) -> TrainingResult:
    options = {"evaluation": EVALUATION, "rng": np.random.default_rng(7)} | kwargs
    split = world.split
    return train(model, split.train, split.valid, world.features, config, checkpoint_folder=folder, **options)


def without_seconds(result: TrainingResult) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def assert_same_state(first: Recommender, second: Recommender) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def script_metric(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Let the evaluations find these values one after the other."""
    left = iter(values)

    def scripted(*args: object, **kwargs: object) -> Evaluation:
        return Evaluation({"recall@20": next(left)}, pl.DataFrame(), 0)

    monkeypatch.setattr(training_loop, "evaluate", scripted)
