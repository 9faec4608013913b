"""Contrastive training of a dual encoder on (picture, text) pairs.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
sec. 2.3 to 2.5; the targets for equal texts follow Yang et al., "Unified Contrastive Learning in
Image-Text-Label Space", CVPR 2022, eq. 2 and 3.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from features.encoders.base import ImageTransform
from features.errors import FeatureError

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class ContrastiveConfig(BaseModel, frozen=True, extra="forbid"):
    """How a dual encoder is trained; the defaults are CLIP's where the size of the data does not matter."""

    epochs: PositiveInt = 10
    batch_size: int = Field(256, ge=2, description="Pairs of a step; each is contrasted with all others.")
    learning_rate: PositiveFloat = Field(
        1e-3, description="At the end of the warm-up; a cosine takes it to 0."
    )
    warmup_share: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Of AdamW, on matrices only.")
    max_gradient_norm: NonNegativeFloat = Field(1.0, description="Longer gradients are cut to it; 0: never.")
    initial_temperature: NonNegativeFloat = Field(0.07, description="0 keeps the encoder's own.")
    min_temperature: PositiveFloat = Field(0.01, description="The learnt temperature never falls below it.")
    equal_texts: Literal["positives", "negatives"] = Field(
        "positives", description="What a pair with the very same text is to a pair in its batch."
    )


class DualEncoder(Protocol):
    """Two towers and a temperature, as `ClipEncoder` has them."""

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        ...

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switch to training, or to evaluation."""
        ...


class TokenizingEncoder(Protocol):
    """What preparing pairs needs of an encoder."""

    image_transform: ImageTransform

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without padding."""
        ...

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, L) int64."""
        ...


@dataclass(frozen=True)
class PairBatch:
    """Pictures and texts of the same items: (B, 3, H, W) and (B, L)."""

    pixels: Tensor
    tokens: Tensor


class PairSource(Protocol):
    """Pairs to train on: in memory (`PreparedPairs`), or read while training goes on."""

    def __len__(self) -> int:
        """Pairs in all."""
        ...

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterable[PairBatch]:
        """Every pair once, in an order drawn from ``rng``, in whole batches only."""
        ...


class PreparedPairs:
    """Pairs prepared once and held in memory, pixels as float16.

    Args:
        encoder: Its transform and tokenizer prepare the pairs.
        pairs: RGB pictures and texts.

    Raises:
        ValueError: No pairs.
    """

    def __init__(self, encoder: TokenizingEncoder, pairs: Iterable[tuple[Image.Image, str]]) -> None:
        pixels: list[Tensor] = []
        texts: list[str] = []
        for picture, text in pairs:
            pixels.append(encoder.image_transform(picture).half())
            texts.append(text)
        if not pixels:
            raise ValueError("there are no pairs; contrastive training needs two or more.")
        self._pixels = torch.stack(pixels)
        self._ids = encoder.token_ids(texts)
        self._pad = encoder.pad

    def __len__(self) -> int:
        return len(self._ids)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[PairBatch]:
        """Every pair once but for a last incomplete batch, which would see fewer negatives."""
        order = rng.permutation(len(self))
        for start in range(0, len(self) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield PairBatch(self._pixels[rows].float(), self._pad([self._ids[row] for row in rows]))


@dataclass(frozen=True)
class EpochRow:
    """How one epoch went; loss and accuracy are means over its batches, while weights changed."""

    epoch: int
    loss: float
    accuracy: float
    """Share of pictures whose most similar text of the batch is their own (or an equal one)."""
    temperature: float
    """At the end of the epoch."""
    seconds: float


@dataclass(frozen=True)
class ContrastiveResult:
    """What training left beside the weights."""

    history: tuple[EpochRow, ...]
    n_steps: int
    seconds: float


def contrastive_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, positives: Tensor | None = None
) -> Tensor:
    """InfoNCE in both directions, averaged.

    Args:
        images: (B, D), of any length; they are normalised here.
        texts: (B, D); row b belongs with ``images[b]``.
        logit_scale: Logarithm of the inverse temperature.
        positives: (B, B) bool, symmetric, true on its diagonal: which pairs belong together. The target of a
            row is spread evenly over its positives. Left out: the diagonal.

    Returns:
        Mean loss of a pair in nats.
    """
    logits = _logits(images, texts, logit_scale)
    if positives is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    targets = positives.to(logits.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, positives: Tensor | None = None
) -> Tensor:
    """Whether each of the B x B pairs belongs together, asked of each by itself.

    Args:
        images: (B, D), of any length; they are normalised here.
        texts: (B, D); row b belongs with ``images[b]``.
        logit_scale: Logarithm of the inverse temperature.
        logit_bias: Added to every logit; well below 0, as most pairs do not belong together.
        positives: (B, B) bool, which pairs belong together. Left out: the diagonal.

    Returns:
        Sum over the pairs, divided by B, in nats.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, sec. 3.2.
    """
    logits = _logits(images, texts, logit_scale) + logit_bias
    if positives is None:
        positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)


def equal_rows(tokens: Tensor) -> Tensor:
    """(B, L) -> (B, B) bool: which rows hold the same tokens."""
    _, group = torch.unique(tokens, dim=0, return_inverse=True)
    return torch.eq(group[:, None], group[None, :])


def train_contrastive(
    encoder: DualEncoder,
    pairs: PairSource,
    config: ContrastiveConfig,
    *,
    rng: np.random.Generator,
    progress: Progress | None = None,
) -> ContrastiveResult:
    """Train ``encoder`` in place, on the device it is on; it is left in evaluation mode.

    Args:
        encoder: Both towers and the temperature are trained; parameters without gradient stay as they are.
        pairs: Batches may lie on any device.
        config: How.
        rng: Of the order of the pairs. Equal weights, pairs and generators give equal results on a CPU.
        progress: Called after each step.

    Raises:
        FeatureError: Fewer pairs than a batch, or the loss is no longer a number.
    """
    n_batches = len(pairs) // config.batch_size
    if n_batches == 0:
        raise FeatureError(
            f"{len(pairs)} pairs do not fill a batch of {config.batch_size}; lower batch_size or give more "
            "pairs."
        )
    n_steps = n_batches * config.epochs
    _set_temperature(encoder, config)
    optimizer = _optimizer(encoder, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, n_steps, config.warmup_share)
    )
    started, done = time.perf_counter(), 0
    history: list[EpochRow] = []
    encoder.train()
    for epoch in range(config.epochs):
        epoch_started = time.perf_counter()
        losses: list[float] = []
        hits: list[float] = []
        for batch in pairs.epoch(config.batch_size, rng):
            loss, accuracy = _step(encoder, optimizer, batch, config)
            if not math.isfinite(loss):
                raise FeatureError(
                    f"the loss is {loss} in step {done + 1} of {n_steps} (epoch {epoch}); lower "
                    f"learning_rate ({config.learning_rate:g}) or raise warmup_share "
                    f"({config.warmup_share:g})."
                )
            schedule.step()
            losses.append(loss)
            hits.append(accuracy)
            done += 1
            if progress is not None:
                progress(done, n_steps)
        temperature = math.exp(-encoder.logit_scale.item())
        seconds = time.perf_counter() - epoch_started
        history.append(EpochRow(epoch, float(np.mean(losses)), float(np.mean(hits)), temperature, seconds))
    encoder.train(mode=False)
    return ContrastiveResult(tuple(history), done, time.perf_counter() - started)


def _step(
    encoder: DualEncoder, optimizer: torch.optim.Optimizer, batch: PairBatch, config: ContrastiveConfig
) -> tuple[float, float]:
    """One update; the loss before it, and the share of pictures that find a text of theirs."""
    device = encoder.logit_scale.device
    tokens = batch.tokens.to(device)
    images = encoder.encode_images(batch.pixels.to(device))
    texts = encoder.encode_texts(tokens)
    positives = equal_rows(tokens) if config.equal_texts == "positives" else None
    loss = contrastive_loss(images, texts, encoder.logit_scale, positives)
    if torch.isfinite(loss):  # otherwise the weights stay as they were, for the caller to look at
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # torch's own signature lacks types
        if config.max_gradient_norm:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        optimizer.step()
        with torch.no_grad():
            encoder.logit_scale.clamp_(max=-math.log(config.min_temperature))
    with torch.no_grad():
        best = _logits(images, texts, encoder.logit_scale).argmax(dim=1)
        own = torch.arange(len(best), device=device)
        found = best == own if positives is None else positives[own, best]
    return loss.item(), found.float().mean().item()


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """(B, B) cosine similarities over the temperature; rows are images."""
    return logit_scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def _set_temperature(encoder: DualEncoder, config: ContrastiveConfig) -> None:
    if config.initial_temperature:
        with torch.no_grad():
            encoder.logit_scale.fill_(-math.log(config.initial_temperature))


def _optimizer(encoder: DualEncoder, config: ContrastiveConfig) -> torch.optim.Optimizer:
    """AdamW with CLIP's constants for ViTs (table 20); gains, biases and the temperature do not decay."""
    trained = [parameter for _, parameter in encoder.named_parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), eps=1e-6
    )


def warmup_cosine(step: int, n_steps: int, warmup_share: float) -> float:
    """Share of the learning rate in a step: a line up, then half a cosine down.

    Args:
        step: From 0.
        n_steps: Steps in all.
        warmup_share: Share of the steps in which the rate rises.
    """
    n_warmup = int(warmup_share * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
