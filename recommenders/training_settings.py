"""How a recommender is trained, and what a training tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import polars as pl
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from recommenders.memory import MemoryEstimate
from recommenders.sampling import SamplingConfig
from recommenders.settings import Counts

HistoryRow = dict[str, float]
"""One epoch: ``epoch``, ``loss``, ``seconds``; where it was evaluated, ``valid_recall@20`` and so on; and
``gradient_norm``, the mean over its steps before clipping, where gradients are clipped."""

PHASES = ("sampling", "forward", "backward", "evaluation", "checkpoint")
"""What an epoch's time is spent on; ``backward`` includes the optimiser's step. Joint training adds
``refresh``, the encoding of all items."""


class TrainingConfig(SamplingConfig, frozen=True, extra="forbid"):
    """How a recommender is trained."""

    epochs: PositiveInt = Field(200, description="Most passes over the training pairs.")
    batch_size: PositiveInt = Field(2048, description="Training pairs per step.")
    learning_rate: PositiveFloat = Field(1e-3, description="Step size of the optimiser.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="adam; adamw, whose weight decay is decoupled; or sgd without momentum."
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="The optimiser's decay of all parameters, beside the L2 that models add themselves."
    )
    n_negatives: PositiveInt = Field(1, description="Negative items drawn for each training pair.")
    patience: NonNegativeInt = Field(
        10, description="Stop after this many evaluations in a row without a gain; 0 never stops early."
    )
    eval_every: PositiveInt = Field(1, description="Epochs from one evaluation on validation to the next.")
    monitor: str = Field(
        "recall@20", description="Validation metric that chooses the best epoch and decides when to stop."
    )
    max_gradient_norm: Annotated[NonNegativeFloat, Counts.IF_CHANGED] = Field(
        0.0,
        description="Scale the gradient of a step down to this length where it is longer, and note its mean "
        "length in the history; 0 never does.",
    )
    amp: Annotated[Literal["off", "bf16", "fp16"], Counts.IF_CHANGED] = Field(
        "off",
        description="Compute the loss in half precision where that is safe (autocast); parameters stay in "
        "float32. fp16 scales the loss and needs a GPU.",
    )
    compile: Annotated[bool, Counts.IF_CHANGED] = Field(
        False, description="Compile the loss with torch.compile; the first steps then take long."
    )
    check_memory: Annotated[bool, Counts.NEVER] = Field(
        True, description="Refuse a training whose estimated memory is more than there is."
    )

    @field_validator("amp", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, raw: object) -> object:
        """Take YAML's word for it: there an unquoted off is the value false."""
        return "off" if raw is False else raw


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What happened; the model itself was left at its best epoch."""

    history: list[HistoryRow]
    best_epoch: int
    """Epoch whose parameters the model has, counted from 1; 0 where there was nothing to train."""
    stopped_early: bool
    resumed_after: int
    """Epochs that a checkpoint supplied."""
    seconds: dict[str, float]
    """Seconds by phase, those before a resume included. On a GPU work is queued, so there the phases of a
    step blur into each other and only their sum is meant."""
    memory: MemoryEstimate | None = None
    """What was estimated before it started; None where there was nothing to train."""

    def history_frame(self) -> pl.DataFrame:
        """Return the history as a table, null where an epoch was not evaluated."""
        return pl.from_dicts(self.history, infer_schema_length=None) if self.history else pl.DataFrame()
