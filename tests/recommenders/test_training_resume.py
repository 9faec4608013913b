from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recommenders.checkpoints import FILE_NAME
from recommenders.errors import TrainingError
from recommenders.feature_input import FeatureTable
from recommenders.models.vbpr import Vbpr
from recommenders.sampling import Batch, TrainingPairs
from tests.recommenders.trainings import (
    FAST,
    DropoutVbpr,
    KilledError,
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


@pytest.mark.parametrize("kind", [Vbpr, DropoutVbpr])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_training_killed_after_epoch_3_ends_as_if_it_had_not_been(
    kind: type[Vbpr], optimizer: str, world: World, tmp_path: Path
) -> None:
    config = FAST.model_copy(update={"optimizer": optimizer})
    whole = vbpr(world, kind)
    expected = run(whole, world, config)

    def die(done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(vbpr(world, kind), world, config, tmp_path, progress=die)
    resumed = vbpr(world, kind)
    result = run(resumed, world, config, tmp_path)
    assert result.resumed_after == 3
    assert without_seconds(result) == without_seconds(expected)
    assert result.best_epoch == expected.best_epoch
    assert_same_state(resumed, whole)


def test_a_training_killed_in_the_middle_of_an_epoch_repeats_that_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vbpr(world)
    expected = run(whole, world)
    calls = 0
    loss_of = Vbpr.loss

    def mortal(self: Vbpr, batch: Batch, features: FeatureTable) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4 * TrainingPairs(world.split.train).n_batches(16) + 2:
            raise KilledError
        return loss_of(self, batch, features)

    with monkeypatch.context() as patch:
        patch.setattr(Vbpr, "loss", mortal)
        with pytest.raises(KilledError):
            run(vbpr(world), world, folder=tmp_path)
    resumed = vbpr(world)
    result = run(resumed, world, folder=tmp_path)
    assert result.resumed_after == 4
    assert without_seconds(result) == without_seconds(expected)
    assert_same_state(resumed, whole)


def test_the_best_epoch_before_a_kill_is_still_the_best_after_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_metric(monkeypatch, [0.9, 0.1])
    first = FAST.model_copy(update={"epochs": 1})
    best = vbpr(world)
    run(best, world, first)
    script_metric(monkeypatch, [0.9, 0.1])

    def die(done: int, total: int) -> None:
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(vbpr(world), world, folder=tmp_path, progress=die)
    script_metric(monkeypatch, [0.2, 0.3, 0.4, 0.5])
    resumed = vbpr(world)
    assert run(resumed, world, folder=tmp_path).best_epoch == 1
    assert_same_state(resumed, best)


def test_a_finished_training_is_not_trained_again(world: World, tmp_path: Path) -> None:
    first, second = vbpr(world), vbpr(world)
    expected = run(first, world, folder=tmp_path)
    result = run(second, world, folder=tmp_path)
    assert result.resumed_after == 6
    assert result.history == expected.history
    assert result.seconds["forward"] == expected.seconds["forward"]
    assert_same_state(first, second)


def test_a_training_that_ran_out_of_patience_is_not_trained_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAST.model_copy(update={"patience": 2})
    script_metric(monkeypatch, [0.5, 0.1, 0.1])
    assert run(vbpr(world), world, config, tmp_path).stopped_early
    script_metric(monkeypatch, [])
    again = run(vbpr(world), world, config, tmp_path)
    assert (again.stopped_early, again.best_epoch, again.resumed_after) == (True, 1, 3)


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(world: World, tmp_path: Path) -> None:
    run(vbpr(world), world, folder=tmp_path)
    other_world = random_world(n_users=20, n_items=25, seed=1)
    cases = [
        (vbpr(world, seed=1), world, FAST, 7, "first parameters"),
        (vbpr(world), world, FAST.model_copy(update={"learning_rate": 0.1}), 7, "training settings"),
        (vbpr(world), world, FAST, 8, "random seeds"),
        (vbpr(world), other_world, FAST, 7, "training pairs, validation pairs, features"),
        (vbpr(world, DropoutVbpr), world, FAST, 7, "model"),
    ]
    for model, data, config, seed, difference in cases:
        with pytest.raises(TrainingError, match=f"a training with other {difference}; .*Delete the file"):
            run(model, data, config, tmp_path, rng=np.random.default_rng(seed))


def test_a_damaged_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    run(vbpr(world), world, folder=tmp_path)
    damaged = bytearray((tmp_path / FILE_NAME).read_bytes())
    damaged[-3] ^= 4
    (tmp_path / FILE_NAME).write_bytes(damaged)
    with pytest.raises(TrainingError, match="checksum"):
        run(vbpr(world), world, folder=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_on_a_gpu_resumes_and_learns(world: World, tmp_path: Path) -> None:
    moved = World(world.interactions, world.split, world.features.to("cuda"))

    def die(done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(vbpr(world, DropoutVbpr).to("cuda"), moved, folder=tmp_path, progress=die)
    result = run(vbpr(world, DropoutVbpr).to("cuda"), moved, folder=tmp_path)
    assert result.resumed_after == 3
    assert result.history[-1]["loss"] < result.history[0]["loss"]
