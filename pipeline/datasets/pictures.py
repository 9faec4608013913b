"""The picture files of a catalogue: inside their folder, there, hashed, and of a size that can be opened."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import fsspec
import polars as pl
from PIL import Image
from pydantic import BaseModel, Field, PositiveInt

from features.catalogue import leaves_folder
from pipeline.datasets.base import RawDataset, few
from pipeline.errors import DatasetError

Progress = Callable[[int, int], None]
"""Called with the number of pictures done and their total."""

Problem = Literal["", "no file", "no access", "too large", "no picture"]

PROBLEMS: Final[dict[Problem, str]] = {
    "no file": "pictures listed but not found (item kept without picture)",
    "no access": "picture files that may not be read (item kept, picture unreadable)",
    "too large": "pictures of more pixels than allowed (item kept; extraction refuses the picture)",
    "no picture": "picture files that are no picture (item kept; extraction gives the reason)",
}
"""What is counted of a dataset's pictures, and what becomes of their items."""


class PictureLimits(BaseModel, frozen=True, extra="forbid"):
    """How pictures are checked while they are hashed."""

    max_pixels: PositiveInt = Field(
        50_000_000, description="Pictures with more pixels are counted; their header says how many they have."
    )
    n_threads: PositiveInt = Field(8, description="Pictures read at the same time.")


@dataclass(frozen=True)
class LookedAt:
    """What reading one picture file found."""

    digest: str | None
    """SHA-256 of the bytes; None where there is no picture, or its bytes could not be had."""
    problem: Problem = ""


def hash_pictures(
    items: pl.DataFrame,
    image_root: str,
    limits: PictureLimits | None = None,
    progress: Progress | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Read every picture once: add ``image_hash`` (SHA-256 of the bytes), and count what is wrong.

    Args:
        items: With ``image``, relative to ``image_root``, or null.
        image_root: Local folder or fsspec URL.
        limits: Which sizes to count, and how many threads read.
        progress: Told after each picture.

    Returns:
        The items with ``image_hash``, and the counts. An item whose picture is not found has neither image
        nor hash; one whose picture is there and may not be read has no hash.

    Raises:
        DatasetError: A path leaves ``image_root``, or reading fails in a way that a second try may mend.
    """
    images = items["image"].to_list() if "image" in items.columns else [None] * len(items)
    looked = list(look_at_pictures(image_root, images, limits or PictureLimits(), progress))
    kept = [None if look.problem == "no file" else image for image, look in zip(images, looked, strict=True)]
    counts = {what: sum(look.problem == problem for look in looked) for problem, what in PROBLEMS.items()}
    hashed = items.with_columns(
        pl.Series("image", kept, dtype=pl.String),
        pl.Series("image_hash", [look.digest for look in looked], dtype=pl.String),
    )
    return hashed, {what: count for what, count in counts.items() if count}


def with_picture_hashes(
    dataset: RawDataset, limits: PictureLimits | None = None, progress: Progress | None = None
) -> RawDataset:
    """The dataset with ``image_hash``, and with the counts of ``hash_pictures`` among its drops."""
    items, counts = hash_pictures(dataset.items, dataset.image_root, limits, progress)
    return replace(dataset, items=items, drops={**dataset.drops, **counts})


def look_at_pictures(
    image_root: str,
    images: Sequence[str | None],
    limits: PictureLimits,
    progress: Progress | None = None,
) -> Iterator[LookedAt]:
    """Read pictures in threads; what was found comes in the order of ``images``.

    Raises:
        DatasetError: As ``hash_pictures``.
    """
    check_inside(image_root, [image for image in images if image is not None])

    def look(image: str | None) -> LookedAt:
        if image is None:
            return LookedAt(None)
        try:
            content = read_picture(image_root, image)
        except PermissionError:
            return LookedAt(None, "no access")
        if content is None:
            return LookedAt(None, "no file")
        return LookedAt(hashlib.sha256(content).hexdigest(), _problem(content, limits.max_pixels))

    with ThreadPoolExecutor(limits.n_threads) as pool, warnings.catch_warnings():
        # Pillow warns of large pictures; we count them, against our own limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for done, looked in enumerate(pool.map(look, images), start=1):
            if progress is not None:
                progress(done, len(images))
            yield looked


def check_inside(image_root: str, images: Sequence[str]) -> None:
    """Refuse paths that lead out of the folder of pictures.

    Raises:
        DatasetError: A path is absolute or climbs out by ``..``; or a local one is a link to a place outside.
    """
    outside = [image for image in images if not _is_inside(image_root, image)]
    if outside:
        raise DatasetError(
            f"{len(outside):,} picture paths leave the folder {image_root or '(none given)'}: "
            f"{few(outside)}. Give paths relative to it, without '..' and links to elsewhere; or name a "
            "folder that holds all pictures."
        )


def is_remote(root: str) -> bool:
    """Whether a root is an fsspec URL and not a local folder."""
    return "://" in root


def read_picture(image_root: str, image: str) -> bytes | None:
    """The bytes of a picture, or None where there is no such file.

    Raises:
        PermissionError: The file may not be read.
        DatasetError: Reading fails for another reason.
    """
    try:
        if is_remote(image_root):
            with fsspec.open(f"{image_root.rstrip('/')}/{image}", "rb") as stream:
                content: bytes = stream.read()
                return content
        return (Path(image_root) / image).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except PermissionError:
        raise
    except OSError as error:
        raise DatasetError(
            f"The picture {image[:200]!r} in {image_root} cannot be read: {error}. Try again, or remove it."
        ) from error


def _problem(content: bytes, max_pixels: int) -> Problem:
    """Look at the header only: no pixel is decoded."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return "too large" if picture.width * picture.height > max_pixels else ""
    except Image.DecompressionBombError:
        return "too large"
    except (OSError, ValueError, SyntaxError):  # what Pillow's readers raise for bytes that are no picture
        return "no picture"


def _is_inside(image_root: str, image: str) -> bool:
    if not image_root or leaves_folder(image):
        return False
    if is_remote(image_root):
        return True
    root = Path(image_root).resolve()
    return (root / image).resolve().is_relative_to(root)
