"""Joint training: recommender and encoder learn together, with gradients that reach the encoder.

First the recommender alone, on the features as they are (a warm start keeps its early, random gradients from
the encoder: Wang et al., PTMRec, arXiv 2502.15542, found joint training from scratch worse than frozen
features); then both, with two learning rates, as in Yuan et al., "Where to go next for recommender systems?
ID- vs. modality-based recommender models revisited", SIGIR 2023, sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.checkpoints import Checkpoint, load_optimizer, optimizer_tensors, with_prefix
from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig
from recommenders.feature_input import FeatureTable
from recommenders.info_nce import info_nce
from recommenders.interactions import Interactions
from recommenders.live import LiveRows, LiveTable, RowEncoder
from recommenders.models.base import Recommender
from recommenders.pooled import PooledPairs
from recommenders.sampling import Batch, TrainingPairs
from recommenders.training import check_training
from recommenders.training_loop import TrainingLoop
from recommenders.training_settings import HistoryRow, TrainingConfig, TrainingResult


class JointConfig(BaseModel, frozen=True, extra="forbid"):
    """How an encoder is trained together with a recommender."""

    warmup_epochs: NonNegativeInt = Field(
        5, description="Epochs in which the recommender learns alone, on the features as they are."
    )
    learning_rate: PositiveFloat = Field(
        1e-5, description="Step size of the encoder; 10 to 100 times smaller than the recommender's."
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="Of AdamW, on the encoder's matrices only.")
    ramp_steps: NonNegativeInt = Field(
        100, description="Steps in which the encoder's learning rate rises from 0, after the warm-up."
    )
    max_gradient_norm: NonNegativeFloat = Field(
        1.0, description="Longer gradients of the encoder are cut to it; 0: never."
    )
    refresh: Literal["epoch", "steps", "never"] = Field(
        "epoch",
        description="When all items are encoded anew: at the end of each epoch, every refresh_steps, or "
        "never, so that an item's vector is of the last batch it was in.",
    )
    refresh_steps: PositiveInt = Field(500, description="Steps between two such encodings.")
    graph_every: NonNegativeInt = Field(
        1, description="Epochs from one rebuilding of the graphs between items to the next; 0: never."
    )
    negative_pool: NonNegativeInt = Field(
        256,
        description="Items that all pairs of a step draw their negatives from, so that few have to be "
        "encoded; 0: any items.",
    )
    contrast_weight: NonNegativeFloat = Field(
        0.0, description="Weight of telling an item's text from other items' by its picture, and back."
    )
    contrast_temperature: PositiveFloat = Field(0.07, description="Temperature of that contrast.")


class TrainableEncoder(RowEncoder, Protocol):
    """An encoder of items by row whose parameters are trained, kept and put back."""

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained, by name, in an order that stays."""
        ...

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Return what is trained, by the part whose gradient is told apart in the history."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that training changes."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave."""
        ...


@dataclass(frozen=True)
class JointInput:
    """What joint training has beside what any training has."""

    live: LiveTable
    """The features, whose rows its encoder keeps up to date."""
    encoder: TrainableEncoder
    """The one of ``live``."""
    config: JointConfig
    writes: bool = True
    """Whether this process keeps checkpoints; with several, one does."""


def train_jointly(
    model: Recommender,
    train: Interactions,
    valid: Interactions,
    joint: JointInput,
    config: TrainingConfig,
    *,
    evaluation: EvaluationConfig,
    rng: np.random.Generator,
    checkpoint_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[HistoryRow], bool] | None = None,
) -> TrainingResult:
    """Train recommender and encoder, and leave both at the epoch that validation chose.

    What ``recommenders.training.train`` says holds here too: the test part is no argument, a killed training
    goes on from its checkpoint and ends as if it had not been killed. ``config.epochs`` counts the warm-up.
    The table is left as the last epoch had it; encode the catalogue anew with the chosen encoder.

    Args:
        model: Freshly built from the features as they are, on the device to train on.
        train: Pairs to learn.
        valid: Pairs that choose the epoch.
        joint: The features and their encoder.
        config: Settings of the recommender's training.
        evaluation: How validation is measured.
        rng: Source of the order of pairs, the negatives and what models draw.
        checkpoint_folder: As there.
        progress: As there.
        watch: As there.

    Raises:
        TrainingError: As there; or the model reads no features, has no parameters, or settings do not go
            together with an encoder that learns.
    """
    _check(model, config, joint)
    check_training(model, valid, config, evaluation)
    loop = _JointLoop(
        model, train=train, valid=valid, joint=joint, config=config, evaluation=evaluation, rng=rng
    )
    return loop.run(checkpoint_folder, progress, watch)


def _check(model: Recommender, config: TrainingConfig, joint: JointInput) -> None:
    name = type(model).__name__
    if not model.needs_features or not model.is_trainable:
        lacks = "reads no features" if not model.needs_features else "has nothing to train"
        raise TrainingError(
            f"{name} {lacks}, so that no gradient could reach an encoder; choose a recommender that learns "
            "from features, such as freedom."
        )
    if joint.config.negative_pool and config.negatives != "uniform":
        raise TrainingError(
            f"joint.negative_pool is {joint.config.negative_pool} and training.negatives is "
            f"{config.negatives!r}; a pool is drawn uniformly. Set the pool to 0, or negatives to uniform."
        )
    if config.amp != "off" or config.compile:
        raise TrainingError(
            "training.amp and training.compile are for recommenders on constant features; in joint training "
            "the encoder's precision is live.precision. Leave both at their defaults."
        )
    if config.epochs <= joint.config.warmup_epochs:
        raise TrainingError(
            f"training.epochs is {config.epochs}, of which joint.warmup_epochs are "
            f"{joint.config.warmup_epochs}: nothing would be trained jointly. Give more epochs."
        )


class _JointLoop(TrainingLoop):
    """The training loop with an encoder that learns after the warm-up."""

    def __init__(
        self,
        model: Recommender,
        *,
        train: Interactions,
        valid: Interactions,
        joint: JointInput,
        config: TrainingConfig,
        evaluation: EvaluationConfig,
        rng: np.random.Generator,
    ) -> None:
        self.live, self.encoder, self.joint, self.writes = (
            joint.live,
            joint.encoder,
            joint.config,
            joint.writes,
        )
        super().__init__(
            model,
            train=train,
            valid=valid,
            features=joint.live.table(),
            config=config,
            evaluation=evaluation,
            rng=rng,
        )
        self.encoder_optimizer = _encoder_optimizer(self.encoder, self.joint)
        self.steps = 0
        """Steps in which the encoder was trained."""
        self.parts: dict[str, Sequence[Tensor]] = {"recommender": list(model.parameters())}
        """What has a gradient of its own in the history."""
        self.parts |= self.encoder.parts()

    @override
    def make_pairs(self) -> TrainingPairs:
        if not self.joint.negative_pool:
            return super().make_pairs()
        return PooledPairs(self.train, self.joint.negative_pool, self.device)

    @override
    def is_out_of_patience(self) -> bool:
        """Tell whether evaluations brought no gain; those of the warm-up do not count."""
        since = self.history[max(self.best_epoch, self.joint.warmup_epochs) :]
        n_since = sum(self.monitor in row for row in since)
        return 0 < self.config.patience <= n_since

    @override
    def train_epoch(self, epoch: int) -> HistoryRow:
        """Train the recommender alone in the warm-up, then both."""
        if epoch <= self.joint.warmup_epochs:
            row = {**super().train_epoch(epoch), "joint": 0.0}
        else:
            row = {**self._train_both(epoch), "joint": 1.0}
        self._agree()
        return row

    @override
    def measure_valid(self) -> HistoryRow:
        """Measure validation; several processes take one's figures, as they have to choose one epoch."""
        row = super().measure_valid()
        figures = torch.tensor(list(row.values()), dtype=torch.float64, device=self.device)
        self.live.peers.agree([figures])
        return dict(zip(row, figures.tolist(), strict=True))

    def _agree(self) -> None:
        """Have all processes go on from one model, one encoder and one table.

        Running statistics of an encoder are of the rows that a process encoded; and sums on a GPU have no
        fixed order, so that copies of one model drift apart in their last digits.
        """
        peers = self.live.peers
        if peers.n_processes == 1:
            return
        encoder = {name: value.to(self.device) for name, value in self.encoder.state().items()}
        peers.agree([*self.model.parameters(), *encoder.values(), *self.live.state().values()])
        self.encoder.load_state(encoder)

    def _train_both(self, epoch: int) -> HistoryRow:
        """Take one step per batch in which the batch's items are encoded."""
        first = self.joint.warmup_epochs + 1
        every = self.joint.graph_every
        if every and epoch > first and (epoch - first) % every == 0:
            self.model.refresh_graph(self.features)
        self.model.train()
        self.model.start_epoch(self.features)
        self.clock.lap("forward")
        losses: list[Tensor] = []
        sizes: list[int] = []
        norms: dict[str, list[Tensor]] = {}
        for batch in self.pairs.epoch(self.config.batch_size, self.config.n_negatives, self.generator):
            self.clock.lap("sampling")
            losses.append(self._step(batch))
            sizes.append(len(batch.users))
            self.stop_if_not_finite(losses[-1:], epoch, first_batch=len(losses))
            for name, norm in self._norms().items():
                norms.setdefault(name, []).append(norm)
            self._update()
            self.clock.lap("backward")
        if self.joint.refresh == "epoch":
            self._refresh()
        self.features = self.live.table()
        row = {"loss": float(np.average(torch.stack(losses).double().cpu().numpy(), weights=sizes))}
        row |= {f"gradient_norm_{name}": float(torch.stack(found).mean()) for name, found in norms.items()}
        return row

    def _step(self, batch: Batch) -> Tensor:
        """Give all parameters their gradients; return the loss."""
        self.optimizer.zero_grad()
        self.encoder_optimizer.zero_grad()
        negatives = batch.negatives.flatten() if self.model.reads_negatives else batch.negatives.new_empty(0)
        items = torch.unique(torch.cat([batch.positives, negatives]))
        return self.live.step(items, lambda table, rows: self._loss_of(batch, table, rows), self.steps)

    def _loss_of(self, batch: Batch, table: FeatureTable, rows: Mapping[str, LiveRows]) -> Tensor:
        loss = self.model.loss(batch, table)
        if self.joint.contrast_weight:
            loss = loss + self.joint.contrast_weight * self._contrast(rows)
        return loss

    def _contrast(self, rows: Mapping[str, LiveRows]) -> Tensor:
        """Return the mean InfoNCE of pictures and texts of the items that have both, in both directions."""
        if not {"image", "text"} <= set(rows):
            raise TrainingError(
                f"joint.contrast_weight is {self.joint.contrast_weight}, but live are only "
                f"{', '.join(rows) or 'no modalities'}; the contrast needs image and text. Set it to 0."
            )
        image, text = rows["image"], rows["text"]
        if image.vectors.shape[1] != text.vectors.shape[1]:
            raise TrainingError(
                f"joint.contrast_weight is {self.joint.contrast_weight}, but vectors of pictures have "
                f"{image.vectors.shape[1]} numbers and those of texts {text.vectors.shape[1]}; only a dual "
                "encoder's can be compared. Set it to 0."
            )
        both = image.rows[torch.isin(image.rows, text.rows)]
        if len(both) < 2:
            return image.vectors.sum() * 0.0
        one, other = (normalize(of.vectors[torch.searchsorted(of.rows, both)], dim=1) for of in (image, text))
        temperature = self.joint.contrast_temperature
        return (info_nce(one, other, temperature) + info_nce(other, one, temperature)) / 2

    def _norms(self) -> dict[str, Tensor]:
        """Return the length of the gradient of the recommender and of each part of the encoder."""
        return {name: _gradient_norm(parameters) for name, parameters in self.parts.items()}

    def _update(self) -> None:
        """Take the step of both optimisers."""
        if self.config.max_gradient_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        if self.joint.max_gradient_norm:
            nn.utils.clip_grad_norm_(self.encoder.parameters(), self.joint.max_gradient_norm)
        self.steps += 1
        ramp = self.joint.ramp_steps
        for group in self.encoder_optimizer.param_groups:
            group["lr"] = self.joint.learning_rate * min(1.0, self.steps / ramp if ramp else 1.0)
        self.optimizer.step()
        self.encoder_optimizer.step()
        if self.joint.refresh == "steps" and self.steps % self.joint.refresh_steps == 0:
            self._refresh()

    def _refresh(self) -> None:
        self._agree()
        self.live.refresh()
        self.clock.lap("refresh")

    @override
    def resume(self, folder: Path, identity: Mapping[str, str]) -> int:
        """Take over the folder's checkpoint; none is written before every process has read it."""
        n_epochs = super().resume(folder, identity)
        self.live.peers.agree([])
        return n_epochs

    @override
    def snapshot(self) -> dict[str, Tensor]:
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        return with_prefix("recommender", own) | with_prefix("encoder", self.encoder.state())

    @override
    def put_back(self, snapshot: Mapping[str, Tensor]) -> None:
        kept = Checkpoint(dict(snapshot), {})
        self.model.load_state_dict(kept.part("recommender"))
        self.encoder.load_state(kept.part("encoder"))

    @override
    def more_tensors(self) -> dict[str, Tensor]:
        tensors = with_prefix("table", self.live.state())
        tensors["encoder_steps"] = torch.tensor(self.steps)
        return tensors | with_prefix("encoder_optimizer", optimizer_tensors(self.encoder_optimizer))

    @override
    def load_more(self, checkpoint: Checkpoint) -> None:
        self.live.load_state(checkpoint.part("table"))
        self.features = self.live.table()
        self.steps = int(checkpoint.tensors["encoder_steps"])
        load_optimizer(self.encoder_optimizer, checkpoint.part("encoder_optimizer"))

    @override
    def identity(self) -> dict[str, str]:
        settings = {"joint settings": self.joint.model_dump_json()}
        shapes = {name: list(value.shape) for name, value in self.encoder.named_parameters().items()}
        return {**super().identity(), **settings, "trained of the encoder": str(shapes)}

    @override
    def save(self, folder: Path, identity: Mapping[str, str]) -> None:
        if self.writes:
            super().save(folder, identity)


def _encoder_optimizer(encoder: TrainableEncoder, config: JointConfig) -> torch.optim.AdamW:
    """AdamW; vectors and scalars do not decay."""
    parameters = encoder.named_parameters().values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


def _gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the length of all gradients together; 0 where none has one."""
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
