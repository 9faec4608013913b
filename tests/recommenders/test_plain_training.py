"""Whole trainings on real ratings reach what a plain dense implementation reaches from the same start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions, Split
from recommenders.models.registry import build_model
from recommenders.sampling import Batch
from recommenders.splitting import SplitConfig, split_interactions
from recommenders.training_loop import TrainingLoop
from recommenders.training_settings import TrainingConfig

RECALL = EvaluationConfig(ks=(20,))
DIM, LAYERS, RATE = 32, 2, 0.01


@pytest.fixture
def films(real_data: Callable[[str], Path]) -> Split:
    """Ratings of 4 and more."""
    rated = pl.read_parquet(real_data("movielens-posters") / "interactions.parquet")
    liked = rated.filter(pl.col("rating") >= 4)
    users, items = (
        liked[name].rank("dense").cast(pl.Int64).to_numpy() - 1 for name in ("user_id", "item_id")
    )
    pairs = Interactions(users, items, int(users.max()) + 1, int(items.max()) + 1)
    return split_interactions(pairs, SplitConfig.model_validate({"rule": "ratio_mmrec", "seed": 0}))


class Recorder:
    """Hands on the pairs of a training, and remembers its batches."""

    def __init__(self, loop: TrainingLoop) -> None:
        self.batches: list[Batch] = []
        self._inner = loop.pairs.epoch

    def __call__(self, *args: Any) -> Iterator[Batch]:
        for batch in self._inner(*args):
            self.batches.append(batch)
            yield batch


def plain_scores(start: Tensor, split: Split, batches: list[Batch], *, layers: int, l2: float) -> Tensor:
    """(U, I) scores after Adam on BPR, all of it dense: no sparse product, no gather that is ours."""
    n_users, n_items = split.train.n_users, split.train.n_items
    size = n_users + n_items
    edges = torch.zeros(size, size)
    users, items = torch.from_numpy(split.train.user_rows), torch.from_numpy(split.train.item_rows) + n_users
    edges[users, items] = edges[items, users] = 1.0
    degrees = edges.sum(dim=1).clamp_min(1)
    graph = edges / degrees.sqrt()[:, None] / degrees.sqrt()[None, :]

    def smoothed(table: Tensor) -> Tensor:
        total = layer = table
        for _ in range(layers):
            layer = graph @ layer
            total = total + layer
        return total / (layers + 1)

    table = start.clone().requires_grad_()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for number, batch in enumerate(batches, start=1):
        own = (batch.users, n_users + batch.positives, n_users + batch.negatives[:, 0])
        user, liked, other = (smoothed(table)[rows] for rows in own)
        difference = (user * liked).sum(1) - (user * other).sum(1)
        lengths = sum((table[rows] ** 2).sum() for rows in own)
        loss = -torch.log(torch.sigmoid(difference)).mean() + l2 / 2 * lengths / len(batch.users)
        (gradient,) = torch.autograd.grad(loss, table)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        step = RATE * (mean / (1 - 0.9**number)) / ((square / (1 - 0.999**number)).sqrt() + 1e-8)
        table = (table.detach() - step).requires_grad_()
    with torch.no_grad():
        final = smoothed(table)
        return final[:n_users] @ final[n_users:].T


def recall(scores: Callable[[Tensor], Tensor], split: Split) -> float:
    return evaluate(scores, split.test, split.train, RECALL).metrics["recall@20"]


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "epochs"), [("bpr", 0, 12), ("lightgcn", LAYERS, 5)])
def test_three_seeds_reach_what_plain_code_reaches(films: Split, name: str, layers: int, epochs: int) -> None:
    settings: dict[str, Any] = {"dim": DIM, "l2": 1e-4} | ({"n_layers": layers} if layers else {})
    counts = np.bincount(films.train.item_rows, minlength=films.train.n_items)
    popularity = torch.from_numpy(counts).float()
    floor = recall(lambda users: popularity.expand(len(users), -1), films)
    ours, plain = [], []
    for seed in range(3):
        first, second = np.random.default_rng(seed).spawn(2)
        model = build_model(name, settings, films.train, FeatureTable(), first)
        start = torch.cat([value.detach().clone() for value in model.parameters()])
        config = TrainingConfig(epochs=epochs, learning_rate=RATE, eval_every=epochs)
        loop = TrainingLoop(
            model,
            train=films.train,
            valid=films.valid,
            features=FeatureTable(),
            config=config,
            evaluation=RECALL,
            rng=second,
        )
        recorder = Recorder(loop)
        loop.pairs.epoch = recorder  # type: ignore[method-assign]
        loop.run()
        model.eval()
        with torch.no_grad():
            ours.append(recall(model.scorer(FeatureTable()), films))
        scores = plain_scores(start, films, recorder.batches, layers=layers, l2=1e-4)
        plain.append(recall(lambda users, scores=scores: scores[users], films))  # type: ignore[misc]
    assert np.mean(ours) > 1.2 * floor
    assert ours == pytest.approx(plain, rel=0.03)
