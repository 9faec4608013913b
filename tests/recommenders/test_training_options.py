"""Settings of training beside the plain loop: negatives, losses, clipping, precision, compilation, keys."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recommenders import training
from recommenders.checkpoints import read_checkpoint
from recommenders.errors import RecommenderError, TrainingError
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender
from recommenders.models.bpr_mf import BprMf, BprMfConfig
from recommenders.models.registry import Setting, build_model, model_config
from recommenders.sampling import TrainingPairs
from recommenders.settings import identity, left_out
from recommenders.training import TrainingConfig
from tests.recommenders.trainings import FAST, assert_same_state, run, vbpr, without_seconds
from tests.worlds import World, random_world, two_clubs

NOTHING = FeatureTable()
LOSSES = ("bpr", "softmax", "bce", "directau")
NEGATIVES = ("uniform", "popularity", "in-batch", "hard")


@pytest.fixture
def world() -> World:
    return random_world(n_users=20, n_items=25)


def built(name: str, train: Interactions, **settings: Setting) -> Recommender:
    return build_model(name, {"dim": 4, **settings}, train, NOTHING, np.random.default_rng(0))


def with_settings(**settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate({**FAST.model_dump(), **settings})


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["bpr", "lightgcn"])
def test_in_two_clubs_every_loss_learns_from_all_negatives(name: str, loss: str, negatives: str) -> None:
    world = two_clubs(n_users=32, n_items=16)
    model = built(name, world.split.train, loss=loss, l2=0.05, uniformity_weight=0.2)
    config = with_settings(
        epochs=30, batch_size=32, learning_rate=0.03, monitor="ndcg@2", negatives=negatives, hard_candidates=3
    )
    evaluation = EvaluationConfig(ks=(2,))
    run(model, world, config, evaluation=evaluation)
    found = evaluate(model.scorer(NOTHING), world.split.test, world.split.train, evaluation)
    assert found.metrics["recall@2"] == 1.0


@pytest.mark.parametrize("name", ["bpr", "lightgcn"])
def test_scores_of_pairs_are_those_of_the_scorer(name: str, world: World) -> None:
    settings: dict[str, Setting] = {"item_bias": True} if name == "bpr" else {}
    model = built(name, world.split.train, **settings)
    if isinstance(model, BprMf) and model.item_bias is not None:
        torch.nn.init.normal_(model.item_bias)
    users, items = torch.tensor([3, 0, 3]), torch.tensor([[1, 2], [24, 0], [1, 1]])
    scores = model.score_pairs(users, items, NOTHING)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, model.scorer(NOTHING)(users).gather(1, items))


def test_hard_negatives_of_a_model_that_scores_no_pairs_are_refused_before_training(world: World) -> None:
    with pytest.raises(
        TrainingError, match=r"'hard'.*SelfCf cannot\. Choose uniform, popularity or in-batch"
    ):
        run(built("selfcf", world.split.train), world, with_settings(negatives="hard"))


def test_a_softmax_within_the_batch_knows_the_bias_of_items(world: World) -> None:
    """The gradient of a bias is that of its item's logit, summed over the rows that it is not left out of."""
    config = BprMfConfig(dim=4, l2=0, item_bias=True, loss="softmax", temperature=0.5)
    train = world.split.train
    model = BprMf(train, NOTHING, config, np.random.default_rng(0))
    batch = next(training_pairs(train).epoch(16, 1, torch.Generator().manual_seed(0)))
    assert batch.in_batch is not None
    model.loss(batch, NOTHING).backward()
    with torch.no_grad():
        logits = model.scorer(NOTHING)(batch.users)[:, batch.positives] / 0.5 - batch.in_batch.log_q
        own = torch.eye(16, dtype=torch.bool)
        shares = logits.masked_fill(batch.in_batch.taken & ~own, -torch.inf).softmax(dim=1)
        expected = torch.zeros(25).index_add_(
            0, batch.positives, (shares - own.float()).sum(dim=0) / 16 / 0.5
        )
    assert model.item_bias is not None
    torch.testing.assert_close(model.item_bias.grad, expected)


def training_pairs(train: Interactions) -> TrainingPairs:
    return TrainingPairs(train, config=with_settings(negatives="in-batch"))


def test_a_bias_that_directau_would_never_train_is_refused() -> None:
    with pytest.raises(RecommenderError, match=r"bpr: item_bias is true and loss is directau"):
        model_config("bpr", {"loss": "directau", "item_bias": True})


def test_clipped_gradients_are_as_long_as_asked_and_their_length_is_noted(world: World) -> None:
    """One step of plain gradient descent: the parameters move by the rate times the clipped length."""
    settings = {"epochs": 1, "batch_size": 10_000, "optimizer": "sgd", "learning_rate": 0.5}
    free, clipped = vbpr(world), vbpr(world)
    before = torch.cat([value.detach().flatten().clone() for value in free.parameters()])
    assert "gradient_norm" not in run(free, world, with_settings(**settings)).history[0]
    result = run(clipped, world, with_settings(**settings, max_gradient_norm=0.01))
    moves = [
        torch.cat([value.detach().flatten() for value in model.parameters()]) - before
        for model in (free, clipped)
    ]
    assert result.history[0]["gradient_norm"] == pytest.approx(float(moves[0].norm()) / 0.5, rel=1e-4)
    assert float(moves[1].norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)
    torch.testing.assert_close(moves[1] / moves[1].norm(), moves[0] / moves[0].norm(), rtol=1e-3, atol=1e-5)
    longer = run(vbpr(world), world, with_settings(**settings, max_gradient_norm=1e6))
    assert longer.history[0]["loss"] == pytest.approx(result.history[0]["loss"])


@pytest.mark.parametrize("name", ["bpr", "lightgcn", "vbpr", "mmgcn", "lgmrec"])
def test_bf16_on_a_cpu_computes_in_half_precision_and_keeps_parameters_in_single(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Recommender:
        return build_model(name, {"dim": 8}, world.split.train, world.features, np.random.default_rng(0))

    kinds = []
    half = model()
    loss_of = type(half).loss

    def noted(self: Recommender, *args: object) -> Tensor:
        table = next(self.parameters())
        kinds.append((table.T @ table).dtype)
        return loss_of(self, *args)

    full = model()
    settings = {"optimizer": "sgd", "learning_rate": 0.1}  # Adam would make much of small gradients' rounding
    expected = run(full, world, with_settings(**settings))
    monkeypatch.setattr(type(half), "loss", noted)
    result = run(half, world, with_settings(**settings, amp="bf16"))
    assert set(kinds) == {torch.bfloat16}
    assert {value.dtype for value in half.parameters()} == {torch.float32}
    losses = [[row["loss"] for row in history] for history in (result.history, expected.history)]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_a_model_that_half_precision_breaks_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: BprMf, *args: object) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.mm(self.users.T, self.users.bfloat16()).sum()

    monkeypatch.setattr(BprMf, "loss", breaks)
    message = r"loss of BprMf cannot be computed with training\.amp \(RuntimeError: .*amp to off"
    with pytest.raises(TrainingError, match=message):
        run(built("bpr", world.split.train), world, with_settings(amp="bf16"))


def test_off_as_yaml_reads_it_is_off() -> None:
    assert TrainingConfig.model_validate({"amp": False}).amp == "off"


def test_fp16_without_a_gpu_is_refused_before_training(world: World) -> None:
    with pytest.raises(TrainingError, match=r"amp is 'fp16' on a cpu.*Choose bf16, or off"):
        run(vbpr(world), world, with_settings(amp="fp16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_on_a_gpu_trains_and_resumes_with_the_scale_of_its_loss(
    amp: str, world: World, tmp_path: Path
) -> None:
    moved = World(world.interactions, world.split, world.features.to("cuda"))
    expected = run(vbpr(world).to("cuda"), moved)
    config = with_settings(amp=amp, max_gradient_norm=10)
    whole = run(vbpr(world).to("cuda"), moved, config)
    np.testing.assert_allclose(
        [row["loss"] for row in whole.history], [row["loss"] for row in expected.history], rtol=0.05
    )
    run(vbpr(world).to("cuda"), moved, config, tmp_path, watch=lambda row: row["epoch"] == 3)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert ("scaler" in checkpoint.facts) == (amp == "fp16")
    resumed = run(vbpr(world).to("cuda"), moved, config, tmp_path)
    assert resumed.resumed_after == 3
    np.testing.assert_allclose(
        [row["loss"] for row in resumed.history], [row["loss"] for row in whole.history], rtol=1e-3
    )


def test_a_scaled_loss_takes_the_same_steps_and_its_scale_is_in_the_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, without the half precision that the scale is for."""
    monkeypatch.setattr(training, "check_training", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    settings = {"optimizer": "sgd", "max_gradient_norm": 0.5}
    plain = run(vbpr(world), world, with_settings(**settings))
    config = with_settings(**settings, amp="fp16")
    scaled = run(vbpr(world), world, config, tmp_path, watch=lambda row: row["epoch"] == 3)
    for row, expected in zip(scaled.history, plain.history, strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    scaler = checkpoint.facts["scaler"]
    assert isinstance(scaler, dict)
    steps = 3 * -(-len(world.split.train) // 16)
    assert scaler["_growth_tracker"] == steps % 2000
    loaded = []
    load = torch.amp.GradScaler.load_state_dict

    def noted(self: torch.amp.GradScaler, state: dict[str, float]) -> None:
        loaded.append(state)
        load(self, state)

    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", noted)
    assert run(vbpr(world), world, config, tmp_path).resumed_after == 3
    assert loaded == [scaler]


@pytest.mark.parametrize("name", ["bpr", "lightgcn", "mmgcn", "lattice", "lgmrec"])
def test_a_compiled_loss_takes_the_same_steps(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def model() -> Recommender:
        return build_model(name, {"dim": 4}, world.split.train, world.features, np.random.default_rng(0))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compiled.append(graph)
        return graph.forward

    expected, compiling = model(), model()
    settings = {"epochs": 2, "optimizer": "sgd"}
    run(expected, world, with_settings(**settings))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run(compiling, world, with_settings(**settings, compile=True))
    assert compiled
    for part, value in expected.state_dict().items():
        torch.testing.assert_close(compiling.state_dict()[part], value, rtol=1e-4, atol=1e-6)


def test_a_loss_that_cannot_be_compiled_stops_the_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    message = r"loss of BprMf cannot be computed with training\.compile \(.*training\.compile to false"
    with pytest.raises(TrainingError, match=message):
        run(built("bpr", world.split.train), world, with_settings(compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpr", "lightgcn"])
def test_the_real_compiler_takes_the_same_steps(name: str, world: World) -> None:
    expected, model = built(name, world.split.train), built(name, world.split.train)
    run(expected, world, with_settings(epochs=1))
    run(model, world, with_settings(epochs=1, compile=True))
    for part, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[part], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_killed_training_resumes_exactly_whatever_its_negatives(
    negatives: str, world: World, tmp_path: Path
) -> None:
    config = with_settings(negatives=negatives, max_gradient_norm=0.1)
    whole, resumed = (built("bpr", world.split.train) for _ in range(2))
    expected = run(whole, world, config)
    run(built("bpr", world.split.train), world, config, tmp_path, watch=lambda row: row["epoch"] == 3)
    result = run(resumed, world, config, tmp_path)
    assert result.resumed_after == 3
    assert without_seconds(result) == without_seconds(expected)
    assert_same_state(resumed, whole)


def test_a_checkpoint_of_other_negatives_is_refused(world: World, tmp_path: Path) -> None:
    run(vbpr(world), world, FAST, tmp_path, watch=lambda row: row["epoch"] == 2)
    with pytest.raises(TrainingError, match="other training settings"):
        run(vbpr(world), world, with_settings(negatives="popularity"), tmp_path)
    # What changes no result is no other training.
    assert run(vbpr(world), world, with_settings(check_memory=False), tmp_path).resumed_after == 2


def test_settings_that_came_later_count_where_they_differ() -> None:
    first = {"epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "n_negatives", "patience"}
    first |= {"eval_every", "monitor"}
    assert set(identity(TrainingConfig())) == first
    assert set(identity(TrainingConfig(negatives="hard", check_memory=False))) == first | {"negatives"}
    assert set(identity(TrainingConfig(amp="bf16", compile=True))) == first | {"amp", "compile"}
    assert "amp" in left_out(TrainingConfig())
    assert identity(BprMfConfig()) == {"dim": 64, "l2": 0.05, "item_bias": False}
    assert set(identity(BprMfConfig(loss="bce"))) == {"dim", "l2", "item_bias", "loss"}
