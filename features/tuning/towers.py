"""From an encoder to the view of one of its towers.

| encoder | towers |
|---|---|
| `open_clip/...`, `tiny` | ViT, ModifiedResNet, timm's ViT; CLIP's and SigLIP's text transformers |
| `vlmo/...` | image and text; not the fused way |
| `transformers/...` | CLIP, SigLIP; ViT, DINOv2; BERT, RoBERTa, XLM-RoBERTa, CamemBERT |
| `sentence-transformers/...` | the same text models |
| `timm/...` | vision transformers |

Every other encoder has none, and is trained whole or not at all.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.encoders.clip import ClipEncoder
from features.encoders.sentence import SentenceEncoder
from features.encoders.timm_models import TimmEncoder
from features.encoders.transformers_dual import DualEncoder
from features.encoders.transformers_text import TextModelEncoder
from features.encoders.transformers_vision import VisionModelEncoder
from features.encoders.unit_length import UnitLengthEncoder
from features.encoders.vlmo.encoder import VlmoEncoder
from features.errors import EncoderError
from features.tuning.clip_towers import clip_image_tower, clip_text_tower
from features.tuning.hidden import Hidden
from features.tuning.timm_towers import timm_tower
from features.tuning.tower import Part, Tower, named_parameters
from features.tuning.transformers_towers import dual_tower, sentence_tower, text_tower, vision_tower
from features.tuning.vlmo_towers import VlmoTower

__all__ = ["Hidden", "Tower", "has_tower", "named_parameters", "tower_of", "towers_of"]


def tower_of(encoder: Encoder, modality: Modality) -> Tower:
    """One modality's tower.

    Raises:
        EncoderError: The encoder lacks the modality, or has no blocks that could be told apart here; it can
            still be trained whole.
    """
    if modality not in encoder.info.modalities:
        known = ", ".join(encoder.info.modalities)
        raise EncoderError(f"encoder {encoder.info.spec!r} has no modality {modality!r}, only {known}.")
    try:
        if isinstance(encoder, UnitLengthEncoder):
            return _UnitLengthTower(encoder, tower_of(encoder.inner, modality))
        return _plain_tower(encoder, modality)
    except EncoderError as error:
        if "mode `full`" in str(error):
            raise
        raise EncoderError(
            f"encoder {encoder.info.spec!r} shows no {modality} tower of blocks: {error}. Its last blocks, "
            "low-rank updates, side adapters, checkpointing and a frozen tower need one; mode `full`, which "
            "trains all of it, still works."
        ) from error


def has_tower(encoder: Encoder, modality: Modality) -> bool:
    """Whether `tower_of` would give one."""
    try:
        tower_of(encoder, modality)
    except EncoderError:
        return False
    return True


def towers_of(encoder: Encoder) -> dict[Modality, Tower]:
    """All single-modality towers of an encoder.

    Raises:
        EncoderError: One of its modalities shows none.
    """
    return {each: tower_of(encoder, each) for each in encoder.info.modalities if each != "fused"}


def _plain_tower(encoder: Encoder, modality: Modality) -> Tower:
    if modality == "fused":
        raise EncoderError("pictures and texts meet inside it")
    if isinstance(encoder, ClipEncoder | VlmoEncoder | DualEncoder):
        return _dual_tower(encoder, modality)
    if isinstance(encoder, VisionModelEncoder):
        return vision_tower(encoder)
    if isinstance(encoder, TextModelEncoder):
        return text_tower(encoder)
    if isinstance(encoder, SentenceEncoder) and modality == "text":
        return sentence_tower(encoder)
    if isinstance(encoder, TimmEncoder):
        return timm_tower(encoder)
    raise EncoderError(f"it is a {type(encoder).__name__}")


def _dual_tower(
    encoder: ClipEncoder | VlmoEncoder | DualEncoder, modality: Literal["image", "text"]
) -> Tower:
    if isinstance(encoder, ClipEncoder):
        return clip_image_tower(encoder) if modality == "image" else clip_text_tower(encoder)
    if isinstance(encoder, VlmoEncoder):
        return VlmoTower(encoder, modality)
    return dual_tower(encoder, modality)


class _UnitLengthTower(Tower):
    """Another tower whose head divides by the vector's length."""

    def __init__(self, encoder: UnitLengthEncoder, inner: Tower) -> None:
        blocks = [inner.block_parts(number) for number in range(inner.n_blocks)]
        super().__init__(encoder, inner.modality, blocks, inner.widths)
        self._inner = inner

    def stem(self, inputs: Tensor) -> Hidden:
        return self._inner.stem(inputs)

    def _context(self, hidden: Hidden) -> Any:
        return self._inner._context(hidden)

    def _block(self, number: int, states: Tensor, context: Any) -> Tensor:
        return self._inner._block(number, states, context)

    def head(self, hidden: Hidden) -> Tensor:
        return normalize(self._inner.head(hidden), dim=1)

    def pooled(self, hidden: Hidden) -> Tensor:
        return self._inner.pooled(hidden)

    def block_modules(self) -> list[nn.Module]:
        return self._inner.block_modules()

    def stem_parts(self) -> Sequence[Part]:
        return self._inner.stem_parts()

    def head_parts(self) -> Sequence[Part]:
        return self._inner.head_parts()
