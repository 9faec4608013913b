"""Training of any recommender: epochs, early stopping on validation, checkpoints that resume exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.memory import available_bytes, check_memory, estimate_memory
from recommenders.metrics import metric_names
from recommenders.models.base import Recommender
from recommenders.training_loop import TrainingLoop
from recommenders.training_settings import PHASES, HistoryRow, TrainingConfig, TrainingResult

__all__ = ["PHASES", "HistoryRow", "TrainingConfig", "TrainingResult", "check_training", "train"]

_WORTH_TELLING = 0.25
"""Share of the free memory from which a training says how much it will need."""


def train(
    model: Recommender,
    train: Interactions,
    valid: Interactions,
    features: FeatureTable,
    config: TrainingConfig,
    *,
    evaluation: EvaluationConfig,
    rng: np.random.Generator,
    checkpoint_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    watch: Callable[[HistoryRow], bool] | None = None,
) -> TrainingResult:
    """Train until validation stops improving, and leave the model at its best epoch.

    The test part is no argument, so nothing here can be chosen by it. A model without parameters comes back
    as it is. With a checkpoint folder, the state after each epoch is kept there; called again with the same
    arguments, a killed training goes on from it and ends, on a CPU bit for bit, as if it had not been killed.

    Args:
        model: Freshly built, on the device to train on.
        train: Pairs to learn, also masked when validation is ranked.
        valid: Pairs that choose the epoch.
        features: The items' features, on the model's device.
        config: Settings.
        evaluation: How validation is measured; its list lengths must include the monitor's.
        rng: Source of the order of pairs, the negatives and what a model draws itself.
        checkpoint_folder: Where to keep the checkpoint; the caller deletes it (``delete_checkpoint``).
        progress: Called with epochs done and ``config.epochs`` after each epoch.
        say: Told the estimated memory, where that is a large share of what there is.
        watch: Called with each epoch's row, first with those of a checkpoint; True ends the training there.

    Raises:
        TrainingError: No pairs to train or validate on, a monitor that is not measured, a loss that is not
            finite, a checkpoint that is damaged or of another training; hard negatives of a model that scores
            no pairs, fp16 without a GPU, a loss that cannot be compiled, or more memory than there is.
    """
    if not model.is_trainable:
        return TrainingResult([], 0, stopped_early=False, resumed_after=0, seconds={})
    check_training(model, valid, config, evaluation)
    memory = estimate_memory(
        model,
        features,
        n_pairs=len(train),
        n_users_measured=len(np.unique(valid.user_rows)),
        batch_size=config.batch_size,
        n_negatives=config.n_negatives * (config.hard_candidates if config.negatives == "hard" else 1),
        optimizer=config.optimizer,
        evaluation=evaluation,
    )
    available = available_bytes(next(model.parameters()).device)
    if config.check_memory:
        check_memory(memory, available)
    if say and memory.to_come_bytes > _WORTH_TELLING * available:
        say(f"  {memory.described()}; {available / 1e6:,.0f} MB are free")
    loop = TrainingLoop(
        model, train=train, valid=valid, features=features, config=config, evaluation=evaluation, rng=rng
    )
    return replace(loop.run(checkpoint_folder, progress, watch), memory=memory)


def check_training(
    model: Recommender, valid: Interactions, config: TrainingConfig, evaluation: EvaluationConfig
) -> None:
    """Refuse what would only fail later."""
    if config.negatives == "hard" and not model.scores_pairs:
        raise TrainingError(
            "training.negatives is 'hard', which asks the model to score pairs in every step; "
            f"{type(model).__name__} cannot. Choose uniform, popularity or in-batch, or a model that can, "
            "such as bpr or lightgcn."
        )
    device = next(model.parameters()).device
    if config.amp == "fp16" and device.type != "cuda":
        raise TrainingError(
            f"training.amp is 'fp16' on a {device.type}, where it is no gain; expected a GPU. "
            "Choose bf16, or off."
        )
    if not len(valid):
        raise TrainingError(
            "There is no validation pair; expected at least one, because validation chooses the epoch. "
            "Give split.valid_share a larger value or choose another split rule."
        )
    measured = metric_names(evaluation.ks)
    if config.monitor not in measured:
        raise TrainingError(
            f"training.monitor is {config.monitor!r}; expected one of {', '.join(measured)}. "
            "Choose one of these, or add its list length to evaluation.ks."
        )
