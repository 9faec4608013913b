"""What a training will take, against what it took; and what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from recommenders import training
from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.memory import MemoryEstimate, available_bytes, check_memory
from recommenders.models.registry import build_model
from recommenders.training import TrainingConfig, TrainingResult, train
from tests.recommenders.trainings import FAST, run, vbpr
from tests.worlds import random_world

HERE = torch.device("cpu")


def measured_training(
    name: str, n_users: int, batch_size: int, block_mb: int, widths: Mapping[str, int]
) -> tuple[TrainingResult, int]:
    """Train two epochs; return the result and the most bytes of tensors made meanwhile and alive at once."""
    n_items, rng = n_users * 3 // 4, np.random.default_rng(0)
    keys = np.unique(np.repeat(np.arange(n_users), 8) * n_items + rng.integers(n_items, size=8 * n_users))
    in_train = rng.random(len(keys)) < 0.9
    parts = [
        Interactions(k // n_items, k % n_items, n_users, n_items) for k in (keys[in_train], keys[~in_train])
    ]
    features = FeatureTable(
        {modality: torch.randn(n_items, width) for modality, width in widths.items()},
        {modality: torch.ones(n_items, dtype=torch.bool) for modality in widths},
    )
    model = build_model(name, {}, parts[0], features, np.random.default_rng(0))
    config = TrainingConfig(epochs=2, batch_size=batch_size)
    evaluation = EvaluationConfig(ks=(20,), block_mb=block_mb)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = train(model, *parts, features, config, evaluation=evaluation, rng=np.random.default_rng(0))
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, int(np.cumsum([event.nbytes() for event in events]).max())


@pytest.mark.parametrize(
    ("n_users", "batch_size", "block_mb"),
    [(4_000, 2048, 8), (6_000, 512, 1), (1_000, 256, 64)],
    ids=["mixed", "tables", "evaluation"],
)
@pytest.mark.parametrize("name", ["bpr", "lightgcn", "vbpr"])
def test_the_estimate_is_within_a_factor_of_two_of_what_tensors_took(
    name: str, n_users: int, batch_size: int, block_mb: int
) -> None:
    result, peak = measured_training(name, n_users, batch_size, block_mb, {"image": 256, "text": 128})
    assert result.memory is not None
    assert peak / 2 < result.memory.to_come_bytes < 2 * peak


@pytest.mark.parametrize(
    ("name", "n_users", "batch_size"),
    [
        *((name, *sizes) for name in ("lattice", "mgcn", "mmgcn") for sizes in ((2_000, 2048), (3_000, 256))),
        *((name, 1_000, 2048) for name in ("damrs", "mvgae")),
    ],
)
def test_a_model_s_own_work_on_every_modality_is_in_the_estimate(
    name: str, n_users: int, batch_size: int
) -> None:
    """Near enough that what the model adds to the estimate of all models cannot be left out of both cases."""
    result, peak = measured_training(name, n_users, batch_size, 1, dict.fromkeys("abc", 64))
    assert result.memory is not None
    assert peak / 1.4 < result.memory.to_come_bytes < 1.4 * peak


def test_the_peak_has_the_larger_of_step_and_evaluation() -> None:
    parts = {"parameters": 1, "graphs": 2, "features": 4, "optimizer": 8, "step": 100, "evaluation": 300}
    assert MemoryEstimate(parts).peak_bytes == 315
    assert MemoryEstimate(parts).to_come_bytes == 308
    assert MemoryEstimate(parts | {"evaluation": 3}).peak_bytes == 115


def test_what_does_not_fit_is_refused_with_what_it_is_for() -> None:
    parts = {"parameters": 10, "graphs": 0, "features": 0, "step": 90_000_000, "evaluation": 5_000_000}
    check_memory(MemoryEstimate(parts), 90_000_000)
    with pytest.raises(TrainingError) as caught:
        check_memory(MemoryEstimate(parts), 89_000_000)
    for part in ("need 90.0 MB", "89.0 MB are free", "step 90.0 MB", "training.check_memory to false"):
        assert part in str(caught.value)


def test_a_training_that_does_not_fit_stops_before_it_starts_unless_told_not_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = random_world(n_users=20, n_items=25)
    monkeypatch.setattr(training, "available_bytes", lambda device: 1000)
    with pytest.raises(TrainingError, match=r"0\.0 MB are free"):
        run(vbpr(world), world)
    assert run(vbpr(world), world, FAST.model_copy(update={"check_memory": False})).history


def test_a_container_s_limit_counts_without_the_files_it_could_forget(tmp_path: Path) -> None:
    of_machine = available_bytes(HERE, tmp_path)  # no limit there
    assert 0 < of_machine <= psutil.virtual_memory().total
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\nactive_file 7\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_bytes(HERE, tmp_path) == 100_300
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(HERE, tmp_path) > 100_300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_what_is_free() -> None:
    device = torch.device("cuda")
    before = available_bytes(device)
    kept = torch.zeros(2**28, dtype=torch.uint8, device=device)
    assert before - available_bytes(device) >= 0.9 * kept.nbytes
