"""The loop that trains: epochs, steps, the best epoch, and checkpoints that resume exactly."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from recommenders.checkpoints import (
    Checkpoint,
    bytes_of,
    check_same_training,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    with_prefix,
    write_checkpoint,
)
from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender
from recommenders.sampling import Batch, TrainingPairs
from recommenders.settings import left_out
from recommenders.training_settings import PHASES, HistoryRow, TrainingConfig, TrainingResult


@dataclass
class Clock:
    """Adds the time since the last call to a phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """Give the time since the last call to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


class TrainingLoop:
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
        self.pairs = self.make_pairs()
        self.optimizer = _optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "fp16" else None
        self.loss_of = torch.compile(model.loss) if config.compile else model.loss
        self.seeds = [int(seed) for seed in rng.integers(2**63, size=2)]
        self.generator = torch.Generator(self.device).manual_seed(self.seeds[0])
        self.history: list[HistoryRow] = []
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self.clock = Clock()

    def make_pairs(self) -> TrainingPairs:
        """Return what hands out the pairs and their negatives."""
        return TrainingPairs(self.train, self.device, self.config, self._pair_scores)

    def run(
        self,
        checkpoint_folder: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[HistoryRow], bool] | None = None,
    ) -> TrainingResult:
        """Train until the epochs are done, nothing is gained any more, or ``watch`` says so."""
        with self.randomness():
            identity = self.identity() if checkpoint_folder else {}
            resumed_after = self.resume(checkpoint_folder, identity) if checkpoint_folder else 0
            ended = watch is not None and any(watch(row) for row in self.history)
            while self.epoch < self.config.epochs and not self.is_out_of_patience() and not ended:
                self.run_epoch()
                if checkpoint_folder:
                    self.save(checkpoint_folder, identity)
                if progress:
                    progress(self.epoch, self.config.epochs)
                ended = watch is not None and watch(self.history[-1])
        if self.best_state:  # ended before the first evaluation, there is none
            self.put_back(self.best_state)
        stopped = self.epoch < self.config.epochs
        return TrainingResult(self.history, self.best_epoch, stopped, resumed_after, self.clock.seconds)

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
        since = [row for row in self.history[self.best_epoch :] if self.monitor in row]
        return 0 < self.config.patience <= len(since)

    def run_epoch(self) -> None:
        """Train one epoch, evaluate it if it is due, and keep it if it is the best."""
        started = self.clock.last = time.perf_counter()
        epoch = self.epoch + 1
        row: HistoryRow = {"epoch": epoch, **self.train_epoch(epoch)}
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            row |= self.measure_valid()
            best = self.history[self.best_epoch - 1][self.monitor] if self.best_epoch else -math.inf
            if row[self.monitor] > best:
                self.best_epoch = epoch
                self.best_state = self.snapshot()
            self.clock.lap("evaluation")
        else:
            self._stop_if_parameters_are_not_finite(epoch)
        row["seconds"] = time.perf_counter() - started
        self.history.append(row)

    def train_epoch(self, epoch: int) -> HistoryRow:
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
                self.stop_if_not_finite(losses[-1:], epoch, first_batch=len(losses))
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
        self.stop_if_not_finite(losses, epoch, first_batch=1)
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

    def stop_if_not_finite(self, losses: list[Tensor], epoch: int, first_batch: int) -> None:
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
    def monitor(self) -> str:
        """Column of the history that chooses the best epoch."""
        return f"valid_{self.config.monitor}"

    def measure_valid(self) -> HistoryRow:
        """Measure validation, training pairs masked."""
        self.model.eval()
        measured = evaluate(
            self.model.scorer(self.features), self.valid, self.train, self.evaluation, device=self.device
        )
        return {f"valid_{name}": value for name, value in measured.metrics.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all that has to be put back to have this epoch's model again."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def put_back(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take over a snapshot."""
        self.model.load_state_dict(snapshot)

    def more_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds beside model, optimiser and random states."""
        return {}

    def load_more(self, checkpoint: Checkpoint) -> None:
        """Take over ``more_tensors``."""

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
        tensors = with_prefix("model", self.snapshot()) | self.more_tensors()
        if self.best_epoch != self.epoch:  # else the best state is the model's
            tensors |= with_prefix("best", self.best_state)
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
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
        self.put_back(checkpoint.part("model"))
        self.load_more(checkpoint)
        best = checkpoint.part("best") or checkpoint.part("model")
        self.best_state = {name: value.to(self.device) for name, value in best.items()}
        load_optimizer(self.optimizer, checkpoint.part("optimizer"))
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
