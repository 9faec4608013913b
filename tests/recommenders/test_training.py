from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from recommenders import training_loop
from recommenders.errors import TrainingError
from recommenders.evaluation import Evaluation, EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.models.bpr_mf import BprMf, BprMfConfig
from recommenders.models.popularity import Popularity, PopularityConfig
from recommenders.models.vbpr import Vbpr
from recommenders.sampling import Batch, TrainingPairs
from recommenders.training import PHASES, HistoryRow, TrainingConfig, train
from tests.recommenders.trainings import (
    EVALUATION,
    FAST,
    DropoutVbpr,
    assert_same_state,
    run,
    script_metric,
    vbpr,
    without_seconds,
)
from tests.worlds import World, random_world


@pytest.fixture
def world() -> World:
    return random_world(n_users=20, n_items=25)


def test_history_has_a_row_per_epoch_and_the_best_epoch_is_restored(world: World) -> None:
    model = vbpr(world)
    states = []

    def remember(done: int, total: int) -> None:
        states.append((done, total, {name: value.clone() for name, value in model.state_dict().items()}))

    result = run(model, world, progress=remember)
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert [state[:2] for state in states] == [(epoch, 6) for epoch in range(1, 7)]
    values = [row["valid_recall@20"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmax(values))
    for name, value in states[result.best_epoch - 1][2].items():
        assert torch.equal(model.state_dict()[name], value)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert {"valid_ndcg@5", "valid_coverage@20", "seconds"} <= set(result.history[0])
    assert not result.stopped_early
    assert set(result.seconds) == set(PHASES)
    spent = sum(result.seconds.values())
    assert spent == pytest.approx(sum(row["seconds"] for row in result.history), rel=0.2, abs=0.02)


def test_the_best_epoch_is_restored_when_it_is_not_the_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_metric(monkeypatch, [0.1, 0.5, 0.5, 0.4, 0.3, 0.2])
    model, two_epochs = vbpr(world), vbpr(world)
    assert run(model, world).best_epoch == 2  # of equals the first
    script_metric(monkeypatch, [0.1, 0.5])
    run(two_epochs, world, FAST.model_copy(update={"epochs": 2}))
    assert_same_state(model, two_epochs)


@pytest.mark.parametrize(("eval_every", "expected_epochs"), [(1, 5), (2, 10)])
def test_patience_counts_evaluations(
    eval_every: int, expected_epochs: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_metric(monkeypatch, [0.1, 0.2, 0.2, 0.1, 0.0, 0.9, 0.9])
    config = FAST.model_copy(update={"epochs": 50, "patience": 3, "eval_every": eval_every})
    result = run(vbpr(world), world, config)
    assert len(result.history) == expected_epochs
    assert result.best_epoch == 2 * eval_every
    assert result.stopped_early


def test_a_gain_renews_the_patience(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    script_metric(monkeypatch, [0.1, 0.1, 0.2, 0.1, 0.3, 0.1, 0.1])
    result = run(vbpr(world), world, FAST.model_copy(update={"epochs": 7, "patience": 2}))
    assert (len(result.history), result.best_epoch) == (7, 5)


def test_the_last_epoch_is_evaluated_and_others_leave_a_gap(world: World) -> None:
    result = run(vbpr(world), world, FAST.model_copy(update={"epochs": 5, "eval_every": 3}))
    column = result.history_frame()["valid_recall@20"]
    assert column.is_null().to_list() == [True, True, False, True, False]
    assert result.history_frame()["epoch"].to_list() == [1, 2, 3, 4, 5]
    assert result.best_epoch in {3, 5}


def test_the_monitored_metric_chooses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter([{"recall@20": 0.9, "ndcg@5": 0.1}, {"recall@20": 0.1, "ndcg@5": 0.9}])
    monkeypatch.setattr(training_loop, "evaluate", lambda *_, **__: Evaluation(next(rows), pl.DataFrame(), 0))
    config = FAST.model_copy(update={"epochs": 2, "monitor": "ndcg@5"})
    assert run(vbpr(world), world, config).best_epoch == 2


def test_a_watcher_sees_every_epoch_and_can_end_the_training_at_its_best_so_far(
    world: World, tmp_path: Path
) -> None:
    seen: list[float] = []

    def until_the_third(row: HistoryRow) -> bool:
        seen.append(row["epoch"])
        return row["epoch"] == 3

    whole, watched = vbpr(world), vbpr(world)
    everything = run(whole, world)
    result = run(watched, world, folder=tmp_path, watch=until_the_third)
    assert without_seconds(result) == without_seconds(everything)[:3]
    assert result.stopped_early
    assert seen == [1, 2, 3]
    resumed = run(vbpr(world), world, folder=tmp_path, watch=until_the_third)
    assert seen == [1, 2, 3, 1, 2, 3]  # told of the checkpoint's epochs, too
    assert without_seconds(resumed) == without_seconds(result)
    ended = run(vbpr(world), world, watch=lambda row: True)
    assert len(ended.history) == 1


def test_equal_seeds_give_equal_trainings_whatever_the_evaluation_blocks(world: World) -> None:
    first, second, other = vbpr(world), vbpr(world), vbpr(world)
    result = run(first, world)
    again = run(second, world, evaluation=EvaluationConfig(ks=(5, 20), block_users=3))
    assert_same_state(first, second)
    assert without_seconds(result) == without_seconds(again)
    unlike = run(other, world, rng=np.random.default_rng(8))
    assert [row["loss"] for row in unlike.history] != [row["loss"] for row in result.history]


def test_the_global_random_state_is_left_alone(world: World) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(vbpr(world, DropoutVbpr), world)
    assert torch.equal(torch.rand(3), expected)


def test_the_test_part_cannot_reach_the_training() -> None:
    names = list(inspect.signature(train).parameters)
    assert names[:4] == ["model", "train", "valid", "features"]
    assert not [name for name in names if name in {"test", "split"}]


def test_every_step_starts_from_fresh_gradients_with_the_negatives_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    loss_of = Vbpr.loss

    def checked(self: Vbpr, batch: Batch, features: FeatureTable) -> Tensor:
        assert self.training
        shapes.append((len(batch.users), batch.negatives.shape[1]))
        return loss_of(self, batch, features)

    monkeypatch.setattr(Vbpr, "loss", checked)
    config = FAST.model_copy(update={"epochs": 1, "n_negatives": 3})
    run(vbpr(world), world, config)
    n_train = len(world.split.train)
    assert [negatives for _, negatives in shapes] == [3] * len(shapes)
    assert [size for size, _ in shapes] == [16] * (n_train // 16) + [n_train % 16] * (n_train % 16 > 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_each_optimiser_is_the_one_named_with_its_weight_decay(optimizer: str, world: World) -> None:
    """One step from known gradients: where the gradient is 0, only the decay moves a parameter."""
    settings = {"epochs": 1, "batch_size": 10_000, "learning_rate": 0.1, "weight_decay": 0.5, "patience": 0}
    config = TrainingConfig.model_validate(settings | {"optimizer": optimizer})
    train_pairs = world.split.train.take(world.split.train.user_rows != 0)  # user 0 gets no gradient
    model = BprMf(train_pairs, FeatureTable(), BprMfConfig(dim=3, l2=0), np.random.default_rng(0))
    before = model.users.detach().clone()
    rng = np.random.default_rng(0)
    train(model, train_pairs, world.split.valid, FeatureTable(), config, evaluation=EVALUATION, rng=rng)
    after = model.users.detach()
    # Adam's first step has length learning_rate in the direction of the gradient, here the decay's.
    expected = {
        "adam": before[0] - 0.1 * before[0].sign(),
        "adamw": before[0] * 0.95,
        "sgd": before[0] * 0.95,
    }
    torch.testing.assert_close(after[0], expected[optimizer], rtol=1e-4, atol=1e-5)
    steps = (after - before * (1 if optimizer == "adam" else 0.95))[1:].abs()
    if optimizer == "sgd":
        assert steps.max() < 0.05
    else:
        torch.testing.assert_close(steps, torch.full_like(steps, 0.1), rtol=1e-2, atol=1e-4)


def test_a_loss_that_is_not_a_number_stops_with_batch_norms_and_advice(world: World) -> None:
    broken = world.features.vectors["text"].clone()
    broken[3, 1] = 1e25
    features = FeatureTable(world.features.vectors | {"text": broken}, world.features.present)
    config = FAST.model_copy(update={"optimizer": "sgd"})  # Adam divides by the gradient's own size
    with pytest.raises(TrainingError) as caught:
        run(vbpr(world), World(world.interactions, world.split, features), config)
    message = str(caught.value)
    assert "The loss of epoch 1, batch " in message
    assert "features text 1e+25" in message
    assert "projections.text" in message
    assert "lower training.learning_rate, now 0.05" in message


def test_what_is_not_finite_is_told_with_the_gradients_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_in_batch(monkeypatch, 2)
    with pytest.raises(TrainingError) as caught:
        run(vbpr(world), world)
    lengths = re.search(r"Lengths of the last gradients: (.*?)\. Normalise", str(caught.value))
    assert lengths is not None
    assert {part.split(" ")[0] for part in lengths[1].split(", ")} == set(
        dict(vbpr(world).named_parameters())
    )
    assert all(float(part.split(" ")[1]) > 0 for part in lengths[1].split(", "))
    assert "training.max_gradient_norm, now 0" in str(caught.value)


def test_what_is_on_disk_after_a_stop_is_the_last_good_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(vbpr(world), world)
    with monkeypatch.context() as patch:
        breaks_in_batch(patch, 3 * TrainingPairs(world.split.train).n_batches(16) + 2)
        with pytest.raises(TrainingError, match="epoch 4, batch 2 is nan"):
            run(vbpr(world), world, folder=tmp_path)
    resumed = run(vbpr(world), world, folder=tmp_path)
    assert resumed.resumed_after == 3
    assert without_seconds(resumed) == without_seconds(expected)


def test_an_epoch_whose_last_step_broke_the_model_is_not_kept_though_nobody_measured_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = TrainingPairs(world.split.train).n_batches(16)
    calls = 0
    loss_of = Vbpr.loss

    def breaks(self: Vbpr, batch: Batch, features: FeatureTable) -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(self, batch, features)
        if calls == last:  # a finite loss whose gradient is not
            loss = loss + torch.sqrt((self.item_bias[0] - self.item_bias[0].detach()).abs())
        return loss

    monkeypatch.setattr(Vbpr, "loss", breaks)
    config = FAST.model_copy(update={"eval_every": 5})
    with pytest.raises(TrainingError, match="item_bias is not finite after epoch 1"):
        run(vbpr(world), world, config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def breaks_in_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the loss of one batch, counted from 1, be NaN."""
    calls = 0
    loss_of = Vbpr.loss

    def breaks(self: Vbpr, batch: Batch, features: FeatureTable) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(self, batch, features) * (torch.nan if calls == number else 1)

    monkeypatch.setattr(Vbpr, "loss", breaks)


def test_no_step_is_taken_on_a_loss_that_is_not_a_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_in_batch(monkeypatch, 2)
    model = vbpr(world)
    with pytest.raises(TrainingError, match="epoch 1, batch 2 is nan"):
        run(model, world)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_model_without_parameters_comes_back_as_it_is(world: World, tmp_path: Path) -> None:
    model = Popularity(world.split.train, world.features, PopularityConfig(), np.random.default_rng(0))
    result = run(model, world, folder=tmp_path)
    assert (result.history, result.best_epoch, result.stopped_early) == ([], 0, False)
    assert len(result.history_frame()) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_validation_pairs_is_refused(world: World) -> None:
    nothing = world.split.valid.take(np.array([], dtype=np.int64))
    with pytest.raises(TrainingError, match=r"no validation pair.*valid_share"):
        train(
            vbpr(world),
            world.split.train,
            nothing,
            world.features,
            FAST,
            evaluation=EVALUATION,
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize("monitor", ["recall@10", "recal@20", "coverage@20"])
def test_a_monitor_that_is_not_measured_is_refused_before_training(monitor: str, world: World) -> None:
    with pytest.raises(TrainingError, match=f"monitor is '{monitor}'; expected one of recall@5, recall@20"):
        run(vbpr(world), world, FAST.model_copy(update={"monitor": monitor}))


def test_every_training_setting_says_what_it_means_and_no_other_is_taken() -> None:
    assert all(field.description for field in TrainingConfig.model_fields.values())
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainingConfig.model_validate({"learning_rat": 0.1})
    with pytest.raises(ValidationError, match="epochs"):
        TrainingConfig(epochs=0)
