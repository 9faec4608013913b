"""Encoders that know nothing: what a feature set is worth is its distance from these.

They go through the ordinary path (pictures are decoded, texts cleaned), so that the same items are left out
and a comparison with a real encoder differs in the vectors alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor

from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import TEXT_CLEANING_VERSION

DEFAULT_DIM = 64
_DIGEST_BYTES = 32
_PLANE_BYTES = 11
"""3 planes of 11 numbers hold the 32 bytes of a digest and one zero; a byte is exact in any float type."""


@dataclass(frozen=True)
class ControlSpec:
    """`random:<dim>:<seed>` or `constant:<dim>`, parsed."""

    kind: str
    dim: int = DEFAULT_DIM
    seed: int = 0


def parse_control(spec: str) -> ControlSpec:
    """Read `random`, `random:<dim>`, `random:<dim>:<seed>`, `constant` or `constant:<dim>`.

    Raises:
        EncoderError: Not of that form, or the dimension is 0.
    """
    kind, *numbers = spec.split(":")
    most = 2 if kind == "random" else 1
    valid = len(numbers) <= most and all(number.isascii() and number.isdigit() for number in numbers)
    values = [int(number) for number in numbers] if valid else []
    if not valid or (values and not 1 <= values[0] <= 65_536):
        form = "random:<dim>:<seed>" if kind == "random" else "constant:<dim>"
        raise EncoderError(
            f"encoder {spec!r}: expected {form} with a dim from 1 to 65536; for example {kind}:{DEFAULT_DIM}."
        )
    return ControlSpec(kind, *values)


def describe_control(spec: str) -> EncoderInfo:
    """Info of `random...` or `constant...`; the digests stand for the settings, as there are no weights."""
    control = parse_control(spec)
    identity: dict[str, JsonValue] = {"control": control.kind, "dim": control.dim, "seed": control.seed}
    reading: dict[str, JsonValue] = {"images": IMAGE_DECODING_VERSION, "texts": TEXT_CLEANING_VERSION}
    suffix = f"-{control.seed}" if control.kind == "random" else ""
    return EncoderInfo(
        spec=spec,
        name=f"{control.kind}-{control.dim}{suffix}",
        family=control.kind,
        weights_sha256=digest_json(identity),
        preprocessing_sha256=digest_json(reading),
        modalities=("image", "text"),
        dims={"image": control.dim, "text": control.dim},
        image_size_px=0,
        context_length=0,
        n_parameters=0,
    )


def load_control(spec: str) -> Encoder:
    """The encoder of a spec that `parse_control` reads."""
    control = parse_control(spec)
    return RandomEncoder(spec) if control.kind == "random" else ConstantEncoder(spec)


def picture_digest(image: Image.Image) -> Tensor:
    """(3, 1, 11) float32: the SHA-256 of a picture's size and pixels, a byte a number."""
    size = np.array(image.size, dtype="<u4").tobytes()
    digest = hashlib.sha256(b"image" + size + image.convert("RGB").tobytes()).digest()
    numbers = torch.zeros(3 * _PLANE_BYTES)
    numbers[:_DIGEST_BYTES] = torch.tensor(list(digest), dtype=torch.float32)
    return numbers.reshape(3, 1, _PLANE_BYTES)


def text_digests(texts: Sequence[str]) -> list[list[int]]:
    """32 ids a text: the bytes of its SHA-256."""
    return [list(hashlib.sha256(b"text" + text.encode("utf-8", "surrogatepass")).digest()) for text in texts]


class RandomEncoder(Encoder):
    """A Gaussian row seeded by the content: equal content, equal vector, whatever else is in the batch."""

    def __init__(self, spec: str) -> None:
        super().__init__(describe_control(spec), picture_digest, text_digests)
        self.control = parse_control(spec)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, 1, 11) of `picture_digest` -> (B, D) float32."""
        return self._rows(pixels.flatten(1)[:, :_DIGEST_BYTES])

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, 32) of `text_digests` -> (B, D) float32."""
        return self._rows(tokens)

    def _rows(self, digests: Tensor) -> Tensor:
        """(B, 32) bytes -> (B, D) draws, each from a generator of its own."""
        content = digests.to(device="cpu", dtype=torch.uint8).numpy()
        rows = np.empty((len(content), self.control.dim), dtype=np.float32)
        for row, digest in zip(rows, content, strict=True):
            seeds = np.frombuffer(digest.tobytes(), dtype="<u4")
            np.random.default_rng([self.control.seed, *seeds.tolist()]).standard_normal(
                dtype=np.float32, out=row
            )
        return torch.from_numpy(rows).to(digests.device)


def blank_picture(image: Image.Image) -> Tensor:  # noqa: ARG001 - the picture must be readable, and nothing more
    """(3, 1, 1) zeros."""
    return torch.zeros(3, 1, 1)


def blank_texts(texts: Sequence[str]) -> list[list[int]]:
    """One token a text, the same for all."""
    return [[0] for _ in texts]


class ConstantEncoder(Encoder):
    """All ones: what is left of a model when its features say only who has them."""

    def __init__(self, spec: str) -> None:
        super().__init__(describe_control(spec), blank_picture, blank_texts)
        self.dim = parse_control(spec).dim

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, ...) -> (B, D) ones."""
        return torch.ones(len(pixels), self.dim, device=pixels.device)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, ...) -> (B, D) ones."""
        return torch.ones(len(tokens), self.dim, device=tokens.device)
