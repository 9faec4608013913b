"""What every encoder is: a module from pictures and texts to vectors that says exactly which one it is."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from pydantic import BaseModel, Field, JsonValue
from torch import Tensor, nn

from features.catalogue import Modality
from features.errors import EncoderError


class EncoderInfo(BaseModel, frozen=True, extra="forbid"):
    """What an encoder is; two encoders with equal digests and modality give interchangeable vectors."""

    spec: str = Field(description="What `load_encoder` was asked for.")
    name: str = Field(description="Short and fit for a file name.")
    family: str
    weights_sha256: str = Field(description="SHA-256 in hex of the weights file's bytes.")
    preprocessing_sha256: str = Field(
        description="SHA-256 in hex of all else that changes vectors: the architecture's settings (its "
        "activation too), how pictures are decoded, resized and scaled, how texts are cleaned and tokenized."
    )
    modalities: tuple[Modality, ...]
    dims: dict[Modality, int] = Field(description="Length of a vector, by modality.")
    image_size_px: int = Field(
        description="Side of the square the encoder looks at; 0 if it sees no pictures."
    )
    context_length: int = Field(description="Most tokens of a text that are read; 0 if it reads no texts.")
    n_parameters: int = Field(description="Numbers in the weights file.")


class Tokenizer(Protocol):
    """Texts -> token ids. Picklable, so that it can run in loader workers."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, start and end included, cut to the context length, without padding."""
        ...


ImageTransform = Callable[[Image.Image], Tensor]
"""RGB picture -> (3, H, W) float32. Picklable, so that it can run in loader workers."""


class Encoder(nn.Module):
    """Pictures and texts in, raw vectors out (not of unit length: readers normalise).

    Everything is differentiable; extraction wraps it in `inference_mode`, fine-tuning does not.

    Args:
        info: What this encoder is.
        image_transform: Turns an RGB picture into the input of `encode_images`.
        tokenizer: Turns texts into ids; `tokenize` adds the padding.
        pad_id: The id that fills rows of `tokenize`. -1 where no id stands for padding alone: the encoder
            then tells padding by its sign (`tokens >= 0`) and puts in what its tower wants.
        pads_to: Length of every row of `tokenize`, in tokens; 0 for the batch's longest text, which is right
            only where tokens behind a text's end cannot change its vector.
    """

    def __init__(
        self,
        info: EncoderInfo,
        image_transform: ImageTransform,
        tokenizer: Tokenizer,
        *,
        pad_id: int = 0,
        pads_to: int = 0,
    ) -> None:
        super().__init__()
        self.info = info
        self.image_transform = image_transform
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.pads_to = pads_to
        self.notes: tuple[str, ...] = ()
        """What a person should know about its weights, such as tensors of the file that are not used."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without padding: sort these by length, then `pad` batch by batch."""
        return self.tokenizer(texts)

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, L) int64 of ``rows`` filled up with `pad_id`; L is `pads_to` or the longest row's length."""
        length = self.pads_to or max((len(row) for row in rows), default=0)
        tokens = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        return tokens

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 for `encode_texts`; L is the batch's longest text where that changes no vector."""
        return self.pad(self.token_ids(texts))

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, so that batches can be made of texts of one length."""
        return [len(ids) for ids in self.token_ids(texts)]

    def encode_images(self, pixels: Tensor) -> Tensor:  # noqa: ARG002 - families override it
        """(B, 3, H, W) of `image_transform` -> (B, D) float32."""
        raise self._lacks("image")

    def encode_texts(self, tokens: Tensor) -> Tensor:  # noqa: ARG002 - families override it
        """(B, L) of `tokenize` -> (B, D) float32."""
        raise self._lacks("text")

    def encode_pairs(self, pixels: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002 - families override it
        """(B, 3, H, W) and (B, L) of the same items -> (B, D) float32."""
        raise self._lacks("fused")

    def _lacks(self, modality: Modality) -> EncoderError:
        known = ", ".join(self.info.modalities)
        return EncoderError(
            f"encoder {self.info.spec!r} has no modality {modality!r}, only {known}; use one of these."
        )


def digest_json(value: Mapping[str, JsonValue]) -> str:
    """SHA-256 in hex of canonical JSON: sorted keys, no spaces, NaN refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 in hex of a file's bytes, streamed; remembered until size, time or inode of the file change."""
    status = path.stat()
    return _digest_file(path, status.st_size, status.st_mtime_ns, status.st_ino)


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 in hex of several files' bytes, in this order; a single file's is `digest_file`'s."""
    digests = [digest_file(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest_file(path: Path, *_version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
