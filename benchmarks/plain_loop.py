"""What a person writes in an afternoon: open_clip's model and transform behind a DataLoader, in float32.

The yardstick of `benchmarks.extraction`: two loader processes, batches of 64, texts padded to 77 tokens,
vectors kept in memory.
"""

import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE, N_LOADERS = 64, 2


class Pictures(Dataset[torch.Tensor]):
    """Decodes and transforms one picture at a time."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as picture:
            pixels: torch.Tensor = self.transform(picture)
        return pixels


class Texts(Dataset[torch.Tensor]):
    """Tokenizes one text at a time."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        self.texts = texts
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> torch.Tensor:
        tokens: torch.Tensor = self.tokenizer([self.texts[number]])[0]
        return tokens


def plain_items_per_s(architecture: str, weights: Path, paths: list[Path], texts: list[str]) -> float:
    """Items a second of the plain loop over pictures, or over texts where there are no paths."""
    model, _, transform = open_clip.create_model_and_transforms(architecture)
    model.load_state_dict(load_file(weights))
    model.eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    data: Dataset[torch.Tensor] = Pictures(paths, transform) if paths else Texts(texts, tokenizer)
    encode = model.encode_image if paths else model.encode_text
    start = time.perf_counter()
    with torch.inference_mode():
        loader = DataLoader(data, BATCH_SIZE, num_workers=N_LOADERS)
        vectors = [encode(batch) for batch in loader]
    taken = time.perf_counter() - start
    return sum(map(len, vectors)) / taken
