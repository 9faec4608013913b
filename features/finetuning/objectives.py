"""The weighted sum of losses of one batch, and its gradient, chunk by chunk."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from features.catalogue import Modality
from features.contrastive import equal_rows
from features.encoders.base import Encoder
from features.encoders.vlmo.encoder import VlmoEncoder
from features.encoders.vlmo.losses import draw_negatives
from features.encoders.word_pieces import WordPieceTokenizer
from features.errors import FeatureError
from features.finetuning.co_purchases import CoPurchases, co_purchase_loss
from features.finetuning.config import ObjectivesConfig
from features.finetuning.contrast import Contrast, contrast_of, unwrapped
from features.finetuning.items import Batch
from features.finetuning.vlmo_objectives import (
    check_heads,
    mask_words,
    masked_loss,
    masked_passes,
    matching_loss,
    matching_passes,
)
from features.gradient_cache import Chunked, Pass, backward_through, chunked_forward

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class BatchReport:
    """What one batch gave, beside gradients."""

    losses: dict[str, float]
    """Each objective, unweighted, and ``loss``: the weighted sum."""
    gradient_norms: dict[str, float]
    """Each objective's, of its weighted gradient for the vectors it compares: how hard it pulls."""


class Objectives:
    """What of an encoder is trained for what.

    Args:
        encoder: On its device, prepared for training.
        config: The weights.
        chunk_size: Items encoded at a time.
        room: Bytes of activations that may be kept between the passes of a batch.
        co_purchases: Among the training items; needed where `co_purchase` has a weight.
        autocast: What passes run in.
        same_picture: (R,) item rows -> (R, R) which have the same picture.

    Raises:
        FeatureError: An objective that the encoder, or what is known of the items, cannot serve.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ObjectivesConfig,
        chunk_size: int,
        *,
        room: int = 0,
        co_purchases: CoPurchases | None,
        autocast: Autocast,
        same_picture: Callable[..., Tensor],
    ) -> None:
        check_objectives(encoder, config, has_pairs=co_purchases is not None)
        self._encoder = unwrapped(encoder)
        self._config, self._size, self._room, self._autocast = config, chunk_size, room, autocast
        self._co_purchases, self._same_picture = co_purchases, same_picture
        self.contrast: Contrast = contrast_of(encoder, config.contrast)
        self.own: dict[str, nn.Parameter] = self.contrast.own if config.image_text else {}
        self._device = next(each.device for each in encoder.parameters())

    def backward(self, batch: Batch, share: float, scale: Callable[[Tensor], Tensor]) -> BatchReport | None:
        """Add the gradient of ``share`` times the weighted losses to the parameters'.

        Args:
            batch: R items.
            share: Of the update, where several batches make one.
            scale: Multiplies the loss where the gradients are of half precision.

        Returns:
            None where too few items could be read for any of the losses. A loss that is no number is reported
            and gives no gradient.
        """
        run = _Run(self, batch)
        parts = {name: self._weight(name) * share * loss for name, loss in run.losses().items()}
        if not parts:
            return None
        total = torch.stack(list(parts.values())).sum()
        losses = {name: (part / (self._weight(name) * share)).item() for name, part in parts.items()}
        losses["loss"] = total.item() / share
        norms: dict[str, float] = {}
        if bool(torch.isfinite(total)):
            leaves = [chunked.outputs for chunked in run.chunks]
            for name, part in parts.items():
                pulls = torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True)
                squares = [pull.double().square().sum() for pull in pulls if pull is not None]
                norms[name] = torch.stack(squares).sum().sqrt().item() / share
            scale(total).backward()  # type: ignore[no-untyped-call] # torch's own signature lacks types
            for chunked in run.chunks:
                backward_through(chunked)
        return BatchReport(losses, norms)

    def _weight(self, name: str) -> float:
        weight: float = getattr(self._config, name)
        return weight

    def enter(self, run: Callable[[], Tensor]) -> Pass:
        """A pass in the chosen precision, with outputs of float32."""

        def entered() -> Tensor:
            with self._autocast():
                outputs = run()
            return outputs.float()

        return entered


class _Run:
    """One batch: each of its towers is run at most once, when the first loss asks for it."""

    def __init__(self, objectives: Objectives, batch: Batch) -> None:
        self._all, self._batch = objectives, batch
        self._config = objectives._config
        device = objectives._device
        self._pixels = None if batch.pixels is None else batch.pixels.to(device, non_blocking=True)
        self._tokens = None if batch.tokens is None else batch.tokens.to(device, non_blocking=True)
        self._made: dict[str, Chunked] = {}
        self._device = device

    @property
    def chunks(self) -> list[Chunked]:
        """All that was run."""
        return list(self._made.values())

    def losses(self) -> dict[str, Tensor]:
        """Name -> unweighted loss, of those that have a weight and items enough."""
        config, own = self._config, slice(0, self._batch.n_own)
        losses: dict[str, Tensor] = {}
        if self._batch.n_own >= 2:
            if config.image_text:
                losses["image_text"] = self._all.contrast.loss(
                    self._images()[own], self._texts()[own], self._positives()
                )
            if config.matching:
                losses["matching"] = self._matching(own)
            if config.masked_language:
                losses["masked_language"] = self._masked(own)
        if config.co_purchase and len(self._batch.pairs) >= 2:
            losses["co_purchase"] = self._co_purchase()
        return losses

    def _images(self) -> Tensor:
        return self._encoded("image", self._pixels, self._all.contrast.images)

    def _texts(self) -> Tensor:
        return self._encoded("text", self._tokens, self._all.contrast.texts)

    def _encoded(self, name: str, inputs: Tensor | None, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(R, C) outputs of a tower, which collect its gradient."""
        if inputs is None:
            raise ValueError(f"the batch was loaded without what the {name} tower takes.")

        def chunk(rows: Tensor) -> Pass:
            return self._all.enter(lambda: encode(rows))

        return self._forward(name, [chunk(rows) for rows in torch.split(inputs, self._all._size)])

    def _forward(self, name: str, passes: Sequence[Pass]) -> Tensor:
        if name not in self._made:
            self._made[name] = chunked_forward(
                passes,
                self._device,
                room=self._all._room - sum(each.kept_bytes for each in self.chunks),
                weights=self._all._encoder.parameters(),
            )
        return self._made[name].outputs

    def _positives(self) -> Tensor | None:
        """(B, B): an item's own, and those of equal text or picture."""
        if self._config.equal_contents == "negatives" or self._tokens is None:
            return None
        n_own = self._batch.n_own
        same = self._all._same_picture(self._batch.rows[:n_own]).to(self._device)
        return equal_rows(self._tokens[:n_own]) | same

    def _matching(self, own: slice) -> Tensor:
        model, pixels, tokens = self._vlmo()
        images, texts = self._images()[own].detach(), self._texts()[own].detach()
        with torch.no_grad():
            logits = self._all.contrast.logits(images, texts)
            equal = self._positives()
            if equal is not None and not bool(equal.all()):  # the very same content is no wrong partner
                logits = logits.masked_fill(equal & ~_diagonal(logits), -torch.inf)
        negatives = draw_negatives(logits)
        passes = matching_passes(
            model.model,
            pixels[own],
            tokens[own],
            negatives,
            size=self._all._size,
            enter=self._all.enter,
        )
        return matching_loss(model.model, self._forward("matching", passes))

    def _masked(self, own: slice) -> Tensor:
        model, pixels, tokens = self._vlmo()
        tokenizer = model.tokenizer
        assert isinstance(tokenizer, WordPieceTokenizer)  # noqa: S101 - as VlmoEncoder takes no other
        share, vocabulary = self._config.masked_share, model.model.config.vocabulary
        hidden, labels = mask_words(tokens[own], tokenizer, vocabulary, share)
        passes = masked_passes(
            model.model,
            pixels[own],
            hidden,
            labels,
            size=self._all._size,
            enter=self._all.enter,
        )
        return masked_loss(model.model, self._forward("masked_language", passes), labels)

    def _vlmo(self) -> tuple[VlmoEncoder, Tensor, Tensor]:
        encoder = self._all._encoder
        assert isinstance(encoder, VlmoEncoder)  # noqa: S101 - check_objectives saw to it
        assert self._pixels is not None  # noqa: S101
        assert self._tokens is not None  # noqa: S101
        return encoder, self._pixels, self._tokens

    def _co_purchase(self) -> Tensor:
        """The contrast of pairs; whatever else was bought together, or has equal content, is no negative."""
        pairs, known = self._batch.pairs, self._all._co_purchases
        assert known is not None  # noqa: S101 - check_objectives saw to it
        rows = self._batch.rows
        ends = [torch.from_numpy(pairs[:, side]).to(self._device) for side in (0, 1)]
        together = torch.from_numpy(known.together(rows[pairs[:, 0]], rows[pairs[:, 1]])).to(self._device)
        losses = []
        for modality in _modalities(self._config.pairs.of):
            vectors = self._item_vectors(modality)
            ignored = together | self._same_content(modality)[ends[0]][:, ends[1]]
            losses.append(
                co_purchase_loss(vectors[ends[0]], vectors[ends[1]], self._config.pairs.temperature, ignored)
            )
        return torch.stack(losses).mean()

    def _item_vectors(self, modality: Modality) -> Tensor:
        """(R, D) of all the batch's items."""
        vectors = self._all.contrast.vectors
        if modality == "image":
            return vectors(self._images())
        if modality == "text":
            return vectors(self._texts())
        encoder = self._all._encoder
        if "fused" not in encoder.info.modalities:
            return (normalize(vectors(self._images()), dim=1) + normalize(vectors(self._texts()), dim=1)) / 2
        if self._pixels is None or self._tokens is None:
            raise ValueError("the batch was loaded without pictures or texts.")

        def chunk(pixels: Tensor, tokens: Tensor) -> Pass:
            return self._all.enter(lambda: encoder.encode_pairs(pixels, tokens))

        size = self._all._size
        both = zip(torch.split(self._pixels, size), torch.split(self._tokens, size), strict=True)
        return self._forward("fused", [chunk(pixels, tokens) for pixels, tokens in both])

    def _same_content(self, modality: Modality) -> Tensor:
        """(R, R): which items cannot be told apart, as what is encoded of them is equal."""
        text = torch.ones(len(self._batch.rows), 1, dtype=torch.bool, device=self._device)
        picture = text
        if modality != "image" and self._tokens is not None:
            text = equal_rows(self._tokens)
        if modality != "text":
            picture = self._all._same_picture(self._batch.rows).to(self._device)
        return text & picture


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)


def _modalities(of: str) -> list[Modality]:
    names: dict[str, list[Modality]] = {
        "each": ["image", "text"],
        "image": ["image"],
        "text": ["text"],
        "fused": ["fused"],
    }
    return names[of]


def needed_modality(config: ObjectivesConfig) -> Modality:
    """What of an item has to be there: its picture, its text, or both (`fused`)."""
    if config.image_text or config.matching or config.masked_language:
        return "fused"
    return {"image": "image", "text": "text"}.get(config.pairs.of, "fused")  # type: ignore[return-value]  # literals


def check_objectives(encoder: Encoder, config: ObjectivesConfig, *, has_pairs: bool) -> None:
    """Refuse objectives that an encoder or a dataset cannot serve, before anything is loaded.

    Raises:
        FeatureError: It says which, and what to do.
    """
    spec, modalities = encoder.info.spec, encoder.info.modalities
    needed = needed_modality(config)
    wanted = ("image", "text") if needed == "fused" else (needed,)
    lacks = [each for each in wanted if each not in modalities]
    if lacks:
        raise FeatureError(
            f"encoder {spec!r} has no {' and no '.join(lacks)} modality, only {', '.join(modalities)}, and "
            "the objectives need it; set objectives.image_text to 0, and objectives.co_purchase to 1 with "
            "objectives.pairs.of the modality it has."
        )
    if config.co_purchase and not has_pairs:
        raise FeatureError(
            "objectives.co_purchase has a weight, but no training interactions were handed in; set it to 0."
        )
    inner = unwrapped(encoder)
    if config.matching or config.masked_language:
        if not isinstance(inner, VlmoEncoder):
            raise FeatureError(
                f"encoder {spec!r} is no VLMo: matching and masked_language need its heads; set both to 0."
            )
        check_heads(inner, *(["itm", "pooler"] if config.matching else []))
        check_heads(inner, *(["mlm"] if config.masked_language else []))
    if not any(True for _ in encoder.parameters()):
        raise FeatureError(f"encoder {spec!r} has no parameters to train; choose another one.")
