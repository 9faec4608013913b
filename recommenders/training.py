"""Training of any recommender: epochs, early stopping on validation, checkpoints that resume exactly."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import polars as pl
import torch
from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from torch import Tensor

from recommenders.checkpoints import (
    Checkpoint,
    bytes_of,
    check_same_training,
    read_checkpoint,
    with_prefix,
    write_checkpoint,
)
from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.memory import MemoryEstimate, available_bytes, check_memory, estimate_memory
from recommenders.metrics import metric_names
from recommenders.models.base import Recommender
from recommenders.sampling import Batch, SamplingConfig, TrainingPairs
from recommenders.settings import Counts, left_out

HistoryRow = dict[str, float]
"""One epoch: ``epoch``, ``loss``, ``seconds``; where it was evaluated, ``valid_recall@20`` and so on; and
``gradient_norm``, the mean over its steps before clipping, where gradients are clipped."""

_WORTH_TELLING = 0.25
"""Share of the free memory from which a training says how much it will need."""
PHASES = ("sampling", "forward", "backward", "evaluation", "checkpoint")
"""What an epoch's time is spent on; ``backward`` includes the optimiser's step."""


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
    _check(model, valid, config, evaluation)
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
    loop = _Loop(
        model, train=train, valid=valid, features=features, config=config, evaluation=evaluation, rng=rng
    )
    with loop.randomness():
        identity = loop.identity() if checkpoint_folder else {}
        resumed_after = loop.resume(checkpoint_folder, identity) if checkpoint_folder else 0
        ended = watch is not None and any(watch(row) for row in loop.history)
        while loop.epoch < config.epochs and not loop.is_out_of_patience() and not ended:
            loop.run_epoch()
            if checkpoint_folder:
                loop.save(checkpoint_folder, identity)
            if progress:
                progress(loop.epoch, config.epochs)
            ended = watch is not None and watch(loop.history[-1])
    if loop.best_state:  # ended before the first evaluation, there is none
        model.load_state_dict(loop.best_state)
    return TrainingResult(
        loop.history, loop.best_epoch, loop.epoch < config.epochs, resumed_after, loop.clock.seconds, memory
    )


def _check(
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


@dataclass
class _Clock:
    """Adds the time since the last call to a phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class _Loop:
    """The state of a training between two epochs, and how to get to the next."""

    def __init__(
        self,
        model: Recommender,
        *,
        train: Interactions,
        valid: Interactions,
        features: FeatureTable,
        config: TrainingConfig,
        evaluation: EvaluationConfig,
        rng: np.random.Generator,
    ) -> None:
        self.model, self.train, self.valid, self.features = model, train, valid, features
        self.config, self.evaluation = config, evaluation
        self.device = next(model.parameters()).device
        self.pairs = TrainingPairs(train, self.device, config, self._pair_scores)
        self.optimizer = _optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "fp16" else None
        self.loss_of = torch.compile(model.loss) if config.compile else model.loss
        self.seeds = [int(seed) for seed in rng.integers(2**63, size=2)]
        self.generator = torch.Generator(self.device).manual_seed(self.seeds[0])
        self.history: list[HistoryRow] = []
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self.clock = _Clock()

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Give what models draw (dropout) a stream of its own, and leave torch's global one as it was."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seeds[1])
            yield

    def is_out_of_patience(self) -> bool:
        """Tell whether the last ``patience`` evaluations brought no gain."""
        since = [row for row in self.history[self.best_epoch :] if self._monitor in row]
        return 0 < self.config.patience <= len(since)

    def run_epoch(self) -> None:
        """Train one epoch, evaluate it if it is due, and keep it if it is the best."""
        started = self.clock.last = time.perf_counter()
        epoch = self.epoch + 1
        row: HistoryRow = {"epoch": epoch, **self._train_epoch(epoch)}
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            row |= self._evaluate()
            best = self.history[self.best_epoch - 1][self._monitor] if self.best_epoch else -math.inf
            if row[self._monitor] > best:
                self.best_epoch = epoch
                self.best_state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.clock.lap("evaluation")
        else:
            self._stop_if_parameters_are_not_finite(epoch)
        row["seconds"] = time.perf_counter() - started
        self.history.append(row)

    def _train_epoch(self, epoch: int) -> HistoryRow:
        """Take one step per batch; return what the history tells of it: mean losses and gradients."""
        self.model.train()
        self.model.start_epoch(self.features)
        self.clock.lap("forward")
        losses: list[Tensor] = []
        sizes: list[int] = []
        norms: list[Tensor] = []
        for batch in self.pairs.epoch(self.config.batch_size, self.config.n_negatives, self.generator):
            self.clock.lap("sampling")
            loss = self._loss(batch)
            losses.append(loss.detach())
            sizes.append(len(batch.users))
            # Reading a number makes a GPU wait, so there all losses of the epoch are looked at together.
            if self.device.type == "cpu":
                self._stop_if_not_finite(losses[-1:], epoch, first_batch=len(losses))
            self.clock.lap("forward")
            self.optimizer.zero_grad()
            if self.scaler is None:
                loss.backward()  # type: ignore[no-untyped-call] # torch leaves it without types
            else:
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # as above
            if self.config.max_gradient_norm:
                norms.append(self._clip())
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.clock.lap("backward")
        self._stop_if_not_finite(losses, epoch, first_batch=1)
        row = {"loss": float(np.average(torch.stack(losses).double().cpu().numpy(), weights=sizes))}
        return row | ({"gradient_norm": float(torch.stack(norms).double().mean())} if norms else {})

    def _loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, computed as the settings ask."""
        if self.config.amp == "off" and not self.config.compile:
            return self.model.loss(batch, self.features)
        try:
            with self._precision():
                return self.loss_of(batch, self.features)
        except TrainingError:
            raise
        except Exception as error:  # what torch raises here is of no one type
            asked = {"training.compile": self.config.compile, "training.amp": self.config.amp != "off"}
            settings = " and ".join(name for name, is_on in asked.items() if is_on)
            first_line = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"The loss of {type(self.model).__name__} cannot be computed with {settings} "
                f"({type(error).__name__}: {first_line}). Set training.compile to false and training.amp to "
                "off."
            ) from error

    def _precision(self) -> AbstractContextManager[object]:
        """Return the context a loss is computed in."""
        if self.config.amp == "off":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _clip(self) -> Tensor:
        """Shorten the gradient of all parameters together where it is too long; return its length before."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)

    def _pair_scores(self, users: Tensor, items: Tensor) -> Tensor:
        return self.model.score_pairs(users, items, self.features)

    def _stop_if_not_finite(self, losses: list[Tensor], epoch: int, first_batch: int) -> None:
        """Raise at the first loss that is NaN or infinite, with the norms that tell why."""
        values = torch.stack(losses).float().cpu().numpy()
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise self._diverged(
                f"The loss of epoch {epoch}, batch {first_batch + int(wrong[0])} is {values[wrong[0]]}"
            )

    def _stop_if_parameters_are_not_finite(self, epoch: int) -> None:
        """Raise if the last step broke the model; an evaluation would tell, but this epoch has none."""
        for name, value in self.model.named_parameters():
            if not bool(value.detach().isfinite().all()):
                raise self._diverged(f"{name} is not finite after epoch {epoch}")

    def _diverged(self, what: str) -> TrainingError:
        """Say what is wrong, with the norms that tell why; what a checkpoint holds is from before."""
        parameters = dict(self.model.named_parameters())
        norms = {f"features {name}": _largest_row(table) for name, table in self.features.vectors.items()}
        norms |= {name: _largest_row(value) for name, value in parameters.items()}
        longest = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
        gradients = ", ".join(
            f"{name} {float(value.grad.double().norm()):.3g}"
            for name, value in parameters.items()
            if value.grad is not None
        )
        return TrainingError(
            f"{what}; expected a finite number. Longest rows: {longest}. Lengths of the last gradients: "
            f"{gradients or 'none yet'}. Normalise features whose rows are long (above about 100); otherwise "
            f"lower training.learning_rate, now {self.config.learning_rate}, or set "
            f"training.max_gradient_norm, now {self.config.max_gradient_norm:g}."
        )

    @property
    def _monitor(self) -> str:
        return f"valid_{self.config.monitor}"

    def _evaluate(self) -> HistoryRow:
        """Measure validation, training pairs masked."""
        self.model.eval()
        measured = evaluate(
            self.model.scorer(self.features), self.valid, self.train, self.evaluation, device=self.device
        )
        return {f"valid_{name}": value for name, value in measured.metrics.items()}

    def identity(self) -> dict[str, str]:
        """Return digests of all that decides how this training goes; called before the first epoch."""
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return {
            "training settings": self.config.model_dump_json(exclude=left_out(self.config)),
            "evaluation settings": self.evaluation.model_dump_json(exclude={"block_users", "block_mb"}),
            "model": f"{type(self.model).__name__} {shapes}",
            "first parameters": _digest(self.model.state_dict()),
            "training pairs": _digest_pairs(self.train),
            "validation pairs": _digest_pairs(self.valid),
            "features": _digest(self.features.vectors),
            "random seeds": str(self.seeds),
            "device": self.device.type,
        }

    def save(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Write the state after an epoch."""
        self.clock.last = time.perf_counter()
        tensors = with_prefix("model", self.model.state_dict())
        if self.best_epoch != self.epoch:  # else the best state is the model's
            tensors |= with_prefix("best", self.best_state)
        for position, state in self.optimizer.state_dict()["state"].items():
            kept = {name: value for name, value in state.items() if value is not None}
            tensors |= with_prefix(f"optimizer.{position}", kept)
        tensors |= {"random.pairs": self.generator.get_state(), "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts: dict[str, JsonValue] = {
            "identity": dict(identity),
            "history": [dict(row) for row in self.history],
            "best_epoch": self.best_epoch,
            "seconds": dict(self.clock.seconds),
        }
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        write_checkpoint(folder, Checkpoint(tensors, facts))
        self.clock.lap("checkpoint")

    def resume(self, folder: Path, identity: Mapping[str, str]) -> int:
        """Take over the folder's checkpoint, if there is one; return the number of epochs it supplies."""
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            return 0
        check_same_training(folder, checkpoint.facts.get("identity"), identity)
        self.history = cast(list[HistoryRow], checkpoint.facts["history"])
        self.best_epoch = cast(int, checkpoint.facts["best_epoch"])
        self.clock.seconds = cast(dict[str, float], checkpoint.facts["seconds"])
        self.model.load_state_dict(checkpoint.part("model"))
        best = checkpoint.part("best") or checkpoint.part("model")
        self.best_state = {name: value.to(self.device) for name, value in best.items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in checkpoint.part("optimizer").items():
            position, key = name.split(".")
            state.setdefault(int(position), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if self.scaler is not None:
            self.scaler.load_state_dict(cast(dict[str, float], checkpoint.facts["scaler"]))
        self.generator.set_state(checkpoint.tensors["random.pairs"])
        torch.set_rng_state(checkpoint.tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"], self.device)
        return self.epoch


def _optimizer(model: Recommender, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser over all parameters, in its fused form: one kernel for a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, fused=True)


def _largest_row(table: Tensor) -> float:
    """Return the length of the longest row of a matrix, or of a vector."""
    return float(table.detach().reshape(len(table), -1).double().norm(dim=1).max())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _digest_pairs(pairs: Interactions) -> str:
    """Hash pairs in their order, which the order of the batches follows."""
    digest = hashlib.sha256(f"{pairs.n_users}|{pairs.n_items}|".encode())
    digest.update(pairs.user_rows.tobytes())
    digest.update(pairs.item_rows.tobytes())
    return digest.hexdigest()
