"""A catalogue of drawn pictures and short texts."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from features.catalogue import Catalogue


def picture_catalogue(folder: Path, n_items: int) -> Catalogue:
    """Items with a picture of noise in large blocks and a text of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "bag", "shoes", "warm", "wool", "leather", "stripes", "small", "large"])
    rows = []
    for number in range(n_items):
        blocks = rng.integers(0, 256, (6, 5, 3), np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(blocks).resize((50, 60), Image.Resampling.BICUBIC).save(path)
        rows.append(
            {
                "item_id": f"i{number}",
                "image": path.name,
                "image_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
                "title": " ".join(rng.choice(words, rng.integers(1, 9))) + f" {number}",
                "description": " ".join(rng.choice(words, rng.integers(1, 20))),
            }
        )
    return Catalogue(pl.DataFrame(rows), str(folder))
