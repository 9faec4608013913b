"""A small catalogue with pictures on disk, and an encoder small enough to be checked by hand."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor, nn

from features.catalogue import Catalogue, Modality
from features.encoders.base import Encoder, EncoderInfo
from features.extraction import ExtractionConfig, ExtractionReport, extract

DIM = 16


def to_small_pixels(image: Image.Image) -> Tensor:
    """(3, 8, 8) float32 in 0..1."""
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255


def to_letters(texts: Sequence[str]) -> list[list[int]]:
    """A token a letter, at most 40."""
    return [[ord(letter) % 64 for letter in text][:40] for text in texts]


class SmallEncoder(Encoder):
    """Real matrix products, whose last bits depend on a batch's shape; seeded weights; all modalities."""

    def __init__(self, *, delay_s: float = 0.0, seed: int = 0) -> None:
        info = EncoderInfo(
            spec="small",
            name="small",
            family="small",
            weights_sha256=hashlib.sha256(b"%d" % seed).hexdigest(),
            preprocessing_sha256="0" * 64,
            modalities=("image", "text", "fused"),
            dims={"image": DIM, "text": DIM, "fused": DIM},
            image_size_px=8,
            context_length=40,
            n_parameters=0,
        )
        super().__init__(info, to_small_pixels, to_letters, pad_id=64)
        generator = torch.Generator().manual_seed(seed)
        self.image_weight = nn.Parameter(torch.randn(3 * 8 * 8, DIM, generator=generator))
        self.letters = nn.Parameter(torch.randn(65, DIM, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.delay_s = delay_s
        self.batches: list[tuple[int, ...]] = []

    def encode_images(self, pixels: Tensor) -> Tensor:
        self._note(pixels)
        return self.dropout(pixels.flatten(1) @ self.image_weight)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        self._note(tokens)
        is_letter = (tokens < 64)[:, :, None]
        return self.dropout((self.letters[tokens] * is_letter).sum(dim=1) / is_letter.sum(dim=1))

    def encode_pairs(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        self._note(pixels)
        n_batches = len(self.batches)
        vectors = self.encode_images(pixels) * self.encode_texts(tokens)
        del self.batches[n_batches:]
        return vectors

    def _note(self, inputs: Tensor) -> None:
        self.batches.append(tuple(inputs.shape))
        time.sleep(self.delay_s)

    @property
    def n_encoded(self) -> int:
        return sum(shape[0] for shape in self.batches)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_picture(path: Path, seed: int, *, mode: str = "RGB") -> str:
    """A noisy PNG; its SHA-256."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return sha256(path.read_bytes())


def small_catalogue(folder: Path, n_items: int = 40, *, first: int = 0, repeat_every: int = 0) -> Catalogue:
    """Items with picture and text; every `repeat_every`-th has the content of the item 7 before it."""
    rows = []
    for number in range(first, first + n_items):
        is_repeat = repeat_every and number % repeat_every == repeat_every - 1 and number - first >= 7
        seed = number - 7 if is_repeat else number
        name = f"{number}.png"
        rows.append(
            {
                "item_id": f"item-{number}",
                "title": f"thing {seed} " + "x" * (seed * 13 % 29),
                "description": None,
                "image": name,
                "image_hash": write_picture(folder / name, seed),
            }
        )
    schema = dict.fromkeys(("item_id", "title", "description", "image", "image_hash"), pl.String)
    return Catalogue(pl.DataFrame(rows, schema=schema), str(folder))


SMALL = ExtractionConfig(batch_size=4, rows_per_part=10, dtype="float32")


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(folder: Path, catalogue: Catalogue, modality: Modality = "image", **options: Any) -> ExtractionReport:
    config = options.pop("config", SMALL)
    return extract(options.pop("encoder", SmallEncoder()), catalogue, modality, folder, config, **options)
