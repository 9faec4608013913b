"""Fine-tuning an encoder on a catalogue: epochs, updates, the choice of the epoch, exact resumption."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from features.catalogue import Catalogue, TextConfig
from features.encoders.base import Encoder
from features.errors import FeatureError
from features.finetuning.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from features.finetuning.co_purchases import CoPurchases
from features.finetuning.config import FinetuningConfig
from features.finetuning.items import Batch, Step, TrainingItems
from features.finetuning.objectives import Objectives, check_objectives, needed_modality
from features.finetuning.optimizer import rate_factors
from features.finetuning.repeatable import digest_of, seed_of, settled_precision
from features.finetuning.retrieval import Retrieval, cross_modal_retrieval
from features.finetuning.updates import Updates
from features.tuning.modes import prepare_tuning

Progress = Callable[[int, int], None]
"""Called with updates done and updates in all."""

HistoryRow = dict[str, float]
"""An epoch; epoch 0 is the encoder before any update."""


@dataclass(frozen=True, eq=False)
class FinetuningResult:
    """What happened; the encoder itself was left at its best epoch."""

    history: list[HistoryRow]
    best_epoch: int
    """0 where no epoch was better than the encoder as it came."""
    stopped_early: bool
    resumed_after: int
    """Updates that a checkpoint supplied."""
    seconds: float
    """Those before a resumption included."""
    n_trained: int
    """Numbers that were trained."""
    counts: dict[str, int]
    """Items: ``train``, ``held_out``, ``missing`` (without what is needed) and ``unreadable``."""
    reasons: dict[str, int]
    """Why items could not be read -> how many."""
    precision: str

    def history_frame(self) -> pl.DataFrame:
        """The history as a table; what an epoch does not have is null."""
        return pl.from_dicts(self.history, infer_schema_length=None)


def finetune(
    encoder: Encoder,
    catalogue: Catalogue,
    config: FinetuningConfig,
    *,
    rng: np.random.Generator,
    text: TextConfig | None = None,
    co_purchases: CoPurchases | None = None,
    checkpoint_folder: Path | None = None,
    progress: Progress | None = None,
) -> FinetuningResult:
    """Train ``encoder`` in place, on its device, and leave it at its best epoch, in evaluation mode.

    Items are held out by the hash of their id; after each epoch their pictures and texts are searched for
    each other, and the epoch with the best mean of Recall@1 and Recall@10 in both directions is kept. Where
    pictures and texts are not contrasted (`image_text` is 0), that says nothing, and the last epoch is kept.

    With a checkpoint folder, the state after each epoch, and after every `checkpoint_steps` updates, is kept
    there; called again with the same arguments, a killed fine-tuning goes on from it and ends, on a CPU bit
    for bit, as if it had not been killed.

    Args:
        encoder: Weights of float32.
        catalogue: The items.
        config: How.
        rng: Of the held-out items, the order, augmentation and dropout.
        text: Which text of an item.
        co_purchases: Of *training* interactions; only `co_purchase` reads them.
        checkpoint_folder: Where the caller lets the state lie until the result is safe.
        progress: Told of updates.

    Raises:
        FeatureError: Too few items, objectives that the encoder cannot serve, a loss that is not finite, or a
            checkpoint that is damaged or of another fine-tuning.
        EncoderError: The encoder cannot be tuned in that mode.
    """
    check_objectives(encoder, config.objectives, has_pairs=co_purchases is not None)
    loop = _Loop(encoder, catalogue, text or TextConfig(), config, rng=rng, co_purchases=co_purchases)
    with loop.randomness():
        resumed_after = loop.resume(checkpoint_folder)
        if not loop.history:
            loop.close_epoch({}, 0.0)
            loop.save()
        while loop.epoch < config.epochs and not loop.is_out_of_patience():
            loop.run_epoch(progress)
            loop.save()
    return loop.finish(resumed_after)


class _Loop:
    """The state between two updates, and how to get to the next."""

    def __init__(
        self,
        encoder: Encoder,
        catalogue: Catalogue,
        text: TextConfig,
        config: FinetuningConfig,
        *,
        rng: np.random.Generator,
        co_purchases: CoPurchases | None,
    ) -> None:
        self.encoder, self.config = encoder, config
        self.device = next(each.device for each in encoder.parameters())
        self.precision = settled_precision(config, self.device)
        self.seeds = [int(seed) for seed in rng.integers(2**62, size=3)]
        held_out_seed, tuning_seed, self.seed = self.seeds
        objectives = config.objectives
        modality = needed_modality(objectives)
        self.items = TrainingItems(catalogue, encoder, modality, text, config, seed=held_out_seed)
        self.pairing = None
        if objectives.co_purchase and co_purchases is not None:
            self.pairing = co_purchases.among(self.items.train)
        self.before = digest_of(encoder.state_dict())
        self.tuned = prepare_tuning(encoder, config.tuning, seed=tuning_seed % 2**31)
        self.objectives = Objectives(
            encoder,
            objectives,
            config.chunk_size,
            room=0 if self.tuned.recomputes else config.activations_mb * 2**20,
            co_purchases=self.pairing,
            autocast=self._autocast,
            same_picture=self.items.same_picture,
        )
        self.trainable: dict[str, nn.Parameter] = self.tuned.trainable | self.objectives.own
        self.updates_per_epoch = math.ceil(len(self._steps(1)) / config.accumulate)
        self.updates = Updates(
            self.trainable,
            rate_factors(encoder, self.trainable, config.optimizer),
            config.optimizer,
            n_updates=self.updates_per_epoch * config.epochs,
            precision=self.precision,
        )
        self.history: list[HistoryRow] = []
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[float, int]] = {}
        """Of the epoch that is under way: sums and numbers that its history row will be the means of."""
        self.epoch_seconds = 0.0
        self.folder: Path | None = None
        self.identity: dict[str, str] = {}
        self._started = time.perf_counter()
        self._seconds_before = 0.0

    @property
    def epoch(self) -> int:
        """Epochs closed."""
        return len(self.history) - 1

    def clock(self) -> float:
        """Seconds of work so far."""
        return self._seconds_before + time.perf_counter() - self._started

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Leave torch's global streams as they were."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            yield

    def is_out_of_patience(self) -> bool:
        """Whether the last ``patience`` epochs brought no gain."""
        return self.can_choose and 0 < self.config.patience <= self.epoch - self.best_epoch

    @property
    def can_choose(self) -> bool:
        """Whether retrieval says how well the encoder learns what it is trained for."""
        return self.items.modality == "fused" and self.config.objectives.image_text > 0

    def run_epoch(self, progress: Progress | None) -> None:
        """Do the updates that are left of an epoch, and measure it."""
        epoch, updates = self.epoch + 1, self.updates
        groups = self._groups(epoch)[updates.done - self.epoch * self.updates_per_epoch :]
        started = time.perf_counter() - self.epoch_seconds
        steps = [step for group in groups for step in group]
        with closing(
            self.items.load(steps, self.config.augment, seed=seed_of(self.seed, 1, epoch))
        ) as loaded:
            for group in groups:
                self._update(islice(loaded, len(group)), len(group))
                self.epoch_seconds = time.perf_counter() - started
                every = self.config.checkpoint_steps
                if every and updates.done % every == 0:
                    self.save()
                if progress is not None:
                    progress(updates.done, updates.n_updates)
        means = {name: total / times for name, (total, times) in self.sums.items()}
        rate = self.config.optimizer.learning_rate * updates.share(updates.done - 1)
        self.close_epoch(means | {"learning_rate": rate}, time.perf_counter() - started)

    def close_epoch(self, means: Mapping[str, float], seconds: float) -> None:
        """Measure the held-out items, keep the state where it is the best, and add a row to the history."""
        epoch = len(self.history)
        found = self._measure() if self.items.modality == "fused" else None
        row: HistoryRow = {"epoch": epoch, **means, **(found.row() if found else {})}
        scores = [past.get("retrieval", -1.0) for past in self.history]
        if found is None or epoch == 0 or not self.can_choose or found.mean > scores[self.best_epoch]:
            self.best_epoch = epoch
            self.best = self.tuned.state()
        self.history.append({**row, "seconds": seconds})
        self.sums, self.epoch_seconds = {}, 0.0

    def _groups(self, epoch: int) -> list[list[Step]]:
        """The batches of each update of an epoch."""
        steps, size = self._steps(epoch), self.config.accumulate
        return [steps[start : start + size] for start in range(0, len(steps), size)]

    def _steps(self, epoch: int) -> list[Step]:
        n_pairs = max(2, round(self.config.objectives.pairs.pairs_share * self.config.batch_size))
        return self.items.steps(self.config.batch_size, n_pairs, self.pairing, (self.seed, 0, epoch))

    def _update(self, batches: Iterator[Batch], n_batches: int) -> None:
        """One step of the optimiser, over one or several batches."""
        torch.manual_seed(seed_of(self.seed, 2, self.updates.done))  # a resumed update draws the same
        self.tuned.train()
        self.updates.start()
        scale = self.updates.scaler.scale
        reports = [self.objectives.backward(batch, 1 / n_batches, scale) for batch in batches]
        noted = self.updates.finish([report for report in reports if report is not None])
        for name, value in noted.items():
            total, times = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, times + 1)

    def _autocast(self) -> torch.autocast:
        kind = torch.float32 if self.precision == "float32" else getattr(torch, self.precision)
        return torch.autocast(self.device.type, kind, enabled=self.precision != "float32")

    def _measure(self) -> Retrieval:
        """Retrieval among the held-out items that can be read."""
        self.tuned.eval()
        contrast, size = self.objectives.contrast, self.config.chunk_size
        nothing = np.zeros((0, 2), dtype=np.int64)
        chunks = (
            self.items.held_out[start : start + size] for start in range(0, len(self.items.held_out), size)
        )
        images, texts, rows = [], [], []
        with torch.inference_mode():
            for batch in self.items.load([Step(chunk, len(chunk), nothing) for chunk in chunks], None):
                if batch.pixels is None or batch.tokens is None:
                    continue  # none of the chunk's pictures could be read
                with self._autocast():
                    images.append(contrast.images(batch.pixels.to(self.device)))
                    texts.append(contrast.texts(batch.tokens.to(self.device)))
                rows.append(batch.rows)
        if not rows:
            raise FeatureError(
                f"none of {len(self.items.held_out)} held-out items could be read; see that the pictures are "
                "where they were at import."
            )
        at = np.concatenate(rows)
        pictures, words = (torch.from_numpy(each).to(self.device) for each in self.items.contents_of(at))
        outputs = [contrast.vectors(torch.cat(each)) for each in (images, texts)]
        return cross_modal_retrieval(outputs[0], outputs[1], pictures, words)

    def resume(self, folder: Path | None) -> int:
        """Take over the folder's checkpoint, if there is one; the number of updates that it supplies."""
        if folder is None:
            return 0
        self.folder, self.identity = folder, self._identity()
        checkpoint = read_checkpoint(folder, self.identity)
        if checkpoint is None:
            return 0
        facts = checkpoint.facts
        self.history = cast("list[HistoryRow]", facts["history"])
        self.best_epoch, done = cast("int", facts["best_epoch"]), cast("int", facts["done"])
        sums = cast("dict[str, list[float]]", facts["sums"])
        self.sums = {name: (total, int(times)) for name, (total, times) in sums.items()}
        self.epoch_seconds = cast("float", facts["epoch_seconds"])
        self._seconds_before = cast("float", facts["seconds"])
        skipped = cast("dict[str, str]", facts["skipped"])
        self.items.skipped.reasons = {int(row): why for row, why in skipped.items()}
        self.tuned.load_state(checkpoint.part("model"))
        self.best = checkpoint.part("best") or self.tuned.state()
        with torch.no_grad():
            for name, value in checkpoint.part("own").items():
                self.objectives.own[name].copy_(value)
        self.updates.load_state(checkpoint.part("optimizer"), cast("dict[str, Any]", facts["scaler"]), done)
        return done

    def save(self) -> None:
        """Write the state after an update; nothing without a folder."""
        if self.folder is None:
            return
        tensors = {f"model/{name}": value for name, value in self.tuned.state().items()}
        tensors |= {f"own/{name}": value for name, value in self.objectives.own.items()}
        if (
            self.updates.done != self.best_epoch * self.updates_per_epoch
        ):  # else the best state is the model's
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.updates.state().items()}
        facts: dict[str, JsonValue] = {
            "identity": dict(self.identity),
            "history": [dict(row) for row in self.history],
            "best_epoch": self.best_epoch,
            "done": self.updates.done,
            "sums": {name: list(sums) for name, sums in self.sums.items()},
            "epoch_seconds": self.epoch_seconds,
            "seconds": self.clock(),
            "skipped": {str(row): why for row, why in self.items.skipped.reasons.items()},
            "scaler": self.updates.scaler.state_dict(),
        }
        write_checkpoint(self.folder, Checkpoint(tensors, facts))

    def _identity(self) -> dict[str, str]:
        """What decides how this fine-tuning goes."""
        pairing = self.pairing
        pairs = {} if pairing is None else {"pairs": pairing.pairs, "weights": pairing.weights}
        interactions = {} if pairing is None else {"users": pairing.user_rows, "items": pairing.item_rows}
        return {
            "settings": json.dumps(self.config.identity(), sort_keys=True),
            "encoder": f"{self.before} {self.encoder.info.preprocessing_sha256}",
            "items": self.items.contents.fingerprint(),
            "interactions": digest_of({k: torch.from_numpy(v) for k, v in (pairs | interactions).items()}),
            "random seeds": str(self.seeds),
            "device": f"{self.device.type} in {self.precision}",
        }

    def finish(self, resumed_after: int) -> FinetuningResult:
        """Leave the encoder at its best epoch, plain again."""
        n_trained = sum(value.numel() for value in self.trainable.values())
        self.tuned.load_state(self.best)
        self.tuned.finish()
        reasons: dict[str, int] = defaultdict(int)
        for why in self.items.skipped.reasons.values():
            reasons[why] += 1
        counts = {
            "train": len(self.items.train),
            "held_out": len(self.items.held_out),
            "missing": self.items.n_missing,
            "unreadable": len(self.items.skipped.reasons),
        }
        stopped = self.epoch < self.config.epochs
        return FinetuningResult(
            history=self.history,
            best_epoch=self.best_epoch,
            stopped_early=stopped,
            resumed_after=resumed_after,
            seconds=self.clock(),
            n_trained=n_trained,
            counts=counts,
            reasons=dict(reasons),
            precision=self.precision,
        )
