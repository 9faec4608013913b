"""Vectors of unit length, where a specification asks for them with `+l2=yes`.

Readers normalise as they are told, so raw vectors are the rule. Published feature sets differ in it: those of
the study arXiv 2310.20343 are of unit length for VLMo and raw for CLIP.
"""

from torch import Tensor
from torch.nn.functional import normalize

from features.encoders.base import Encoder, EncoderInfo, digest_json


class UnitLengthEncoder(Encoder):
    """Another encoder's vectors, each divided by its Euclidean length (a row of zeros stays)."""

    def __init__(self, spec: str, inner: Encoder) -> None:
        super().__init__(
            unit_length_info(spec, inner.info),
            inner.image_transform,
            inner.tokenizer,
            pad_id=inner.pad_id,
            pads_to=inner.pads_to,
        )
        self.inner = inner
        self.notes = inner.notes

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32, rows of length 1."""
        return normalize(self.inner.encode_images(pixels), dim=1)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32, rows of length 1."""
        return normalize(self.inner.encode_texts(tokens), dim=1)

    def encode_pairs(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, L) -> (B, D) float32, rows of length 1."""
        return normalize(self.inner.encode_pairs(pixels, tokens), dim=1)


def unit_length_info(spec: str, inner: EncoderInfo) -> EncoderInfo:
    """The inner encoder's info with a digest of its own, as the vectors differ."""
    digest = digest_json({"preprocessing": inner.preprocessing_sha256, "l2": True})
    return inner.model_copy(update={"spec": spec, "name": f"{inner.name}-l2", "preprocessing_sha256": digest})
