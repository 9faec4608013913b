"""What an encoder's contrast of pictures and texts is made of: two passes, a temperature and a loss."""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from features.contrastive import contrastive_loss, sigmoid_loss
from features.encoders.base import Encoder
from features.encoders.unit_length import UnitLengthEncoder
from features.encoders.vlmo.encoder import VlmoEncoder
from features.encoders.vlmo.model import Vlmo
from features.errors import FeatureError

_INITIAL_TEMPERATURE = 0.07
"""Of encoders that keep none (Radford et al., 2021, sec. 2.5)."""


class Contrast(Protocol):
    """How one encoder is contrasted."""

    own: dict[str, nn.Parameter]
    """Parameters that are trained beside the encoder's, by name; they are not kept."""

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), all that `loss` reads of a picture."""
        ...

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, C)."""
        ...

    def vectors(self, outputs: Tensor) -> Tensor:
        """(B, C) -> (B, D): the part of `images` or `texts` that stands for an item."""
        ...

    def loss(self, images: Tensor, texts: Tensor, positives: Tensor | None) -> Tensor:
        """(B, C), (B, C) and (B, B) -> the mean loss of a pair."""
        ...

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, B) scaled similarities, pictures in rows."""
        ...


class PlainContrast:
    """Two towers and one temperature.

    Args:
        encoder: Of pictures, of texts, or of both.
        kind: The loss; ``auto`` takes the sigmoid where the encoder has a bias for it.
    """

    def __init__(self, encoder: Encoder, kind: Literal["auto", "softmax", "sigmoid"]) -> None:
        self._encoder = encoder
        self.own: dict[str, nn.Parameter] = {}
        device = next((each.device for each in encoder.parameters()), torch.device("cpu"))
        scale, bias = _learnt(encoder, "logit_scale"), _learnt(encoder, "logit_bias")
        self.kind = kind if kind != "auto" else "softmax" if bias is None else "sigmoid"
        if scale is None:
            scale = nn.Parameter(torch.tensor(-math.log(_INITIAL_TEMPERATURE), device=device))
            self.own["contrast.logit_scale"] = scale
        if bias is None and self.kind == "sigmoid":
            bias = nn.Parameter(torch.tensor(-10.0, device=device))  # Zhai et al., 2023, sec. 3.2
            self.own["contrast.logit_bias"] = bias
        self._scale, self._bias = scale, bias

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self._encoder.encode_images(pixels)

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        return self._encoder.encode_texts(tokens)

    def vectors(self, outputs: Tensor) -> Tensor:
        """All of it."""
        return outputs

    def loss(self, images: Tensor, texts: Tensor, positives: Tensor | None) -> Tensor:
        """InfoNCE, or SigLIP's loss."""
        if self.kind == "sigmoid" and self._bias is not None:
            return sigmoid_loss(images, texts, self._scale, self._bias, positives)
        return contrastive_loss(images, texts, self._scale, positives)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, B) without the bias, which no order depends on."""
        unit = torch.nn.functional.normalize
        return self._scale.exp() * unit(images, dim=1) @ unit(texts, dim=1).T


class VlmoContrast:
    """VLMo's: through each modality's own experts and, where a checkpoint has the heads, the shared ones.

    The loss is the mean over both ways, as in `features.encoders.vlmo.losses`.
    """

    def __init__(self, encoder: VlmoEncoder) -> None:
        self._model: Vlmo = encoder.model
        self._ways = [vl for vl in (False, True) if ("itc_vl" if vl else "itc") in self._model.heads]
        if not self._ways:
            raise FeatureError(
                f"encoder {encoder.info.spec!r} has no contrastive heads; take a checkpoint with them, or "
                "set objectives.image_text to 0."
            )
        self._taken = len(self._ways) - 1 if encoder.options.output == "vl" else 0
        self.own: dict[str, nn.Parameter] = {}

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ways x D)."""
        towers = self._model.image_pass(pixels, vl=True in self._ways)
        return torch.cat([self._model.image_embedding(towers, vl=vl) for vl in self._ways], dim=1)

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L), -1 where there is padding -> (B, ways x D)."""
        towers = self._model.text_pass(tokens.clamp(min=0), tokens >= 0, vl=True in self._ways)
        return torch.cat([self._model.text_embedding(towers, vl=vl) for vl in self._ways], dim=1)

    def vectors(self, outputs: Tensor) -> Tensor:
        """The embedding of the way that the encoder's `output` names."""
        return self._split(outputs)[self._taken]

    def loss(self, images: Tensor, texts: Tensor, positives: Tensor | None) -> Tensor:
        """Mean of the ways' InfoNCE."""
        pairs = zip(self._split(images), self._split(texts), self._ways, strict=True)
        losses = [contrastive_loss(image, text, self._scale(vl=vl), positives) for image, text, vl in pairs]
        return torch.stack(losses).mean()

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Of the first way, which hard negatives are drawn by."""
        image, text = self._split(images)[0], self._split(texts)[0]
        return self._scale(vl=self._ways[0]).exp() * self._model.unit(image) @ self._model.unit(text).T

    def _split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.chunk(len(self._ways), dim=1)

    def _scale(self, *, vl: bool) -> nn.Parameter:
        return self._model.get_parameter("logit_vl_scale" if vl else "logit_scale")


def contrast_of(encoder: Encoder, kind: Literal["auto", "softmax", "sigmoid"]) -> Contrast:
    """How an encoder is contrasted.

    Raises:
        FeatureError: The sigmoid loss for a VLMo, or a VLMo without contrastive heads.
    """
    inner = unwrapped(encoder)
    if not isinstance(inner, VlmoEncoder):
        return PlainContrast(inner, kind)
    if kind == "sigmoid":
        raise FeatureError("VLMo has no bias for the sigmoid loss; set objectives.contrast to auto.")
    return VlmoContrast(inner)


def unwrapped(encoder: Encoder) -> Encoder:
    """The encoder itself: unit length is no matter to a contrast, which normalises."""
    return unwrapped(encoder.inner) if isinstance(encoder, UnitLengthEncoder) else encoder


def _learnt(encoder: Encoder, name: str) -> nn.Parameter | None:
    """A temperature or a bias: the encoder's, or its model's; None where it is fixed or there is none."""
    for holder in (encoder, getattr(encoder, "model", None)):
        found = getattr(holder, name, None)
        if isinstance(found, nn.Parameter):
            return found
    return None
