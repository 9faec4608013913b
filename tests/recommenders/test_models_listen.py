"""Models that are to compare encoders must tell features that cause choices from random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.models.registry import build_model
from recommenders.training import TrainingConfig, train
from tests.recommenders.test_vbpr import chosen_by_content


@pytest.mark.parametrize("name", ["freedom", "lattice", "mmgcf", "mmgcl", "slmrec"])
def test_features_that_cause_the_choices_beat_random_features(name: str) -> None:
    world = chosen_by_content()
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal((200, 16), dtype=np.float32))
    random_table = FeatureTable({"image": normalize(noise, dim=1)}, world.features.present)
    config = TrainingConfig(epochs=20, batch_size=64, learning_rate=0.02, patience=0)
    evaluation = EvaluationConfig(ks=(20,))
    recall = {}
    for kind, table in (("true", world.features), ("random", random_table)):
        model = build_model(name, {"dim": 8}, world.split.train, table, np.random.default_rng(0))
        rng = np.random.default_rng(1)
        train(model, world.split.train, world.split.valid, table, config, evaluation=evaluation, rng=rng)
        measured = evaluate(model.scorer(table), world.split.test, world.split.train, evaluation)
        recall[kind] = measured.metrics["recall@20"]
    chance = 20 / (200 - 2)
    assert recall["true"] > 1.3 * recall["random"], recall
    assert recall["true"] > 3 * chance, recall
