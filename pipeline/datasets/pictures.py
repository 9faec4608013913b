"""The picture files of a catalogue: inside their folder, there, hashed, and of a size that can be opened."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import fsspec
import polars as pl
from PIL import Image
from pydantic import BaseModel, Field, PositiveInt

from pipeline.datasets.base import RawDataset, few
from pipeline.errors import DatasetError

Progress = Callable[[int, int], None]
"""Called with the number of pictures done and their total."""

NO_FILE: Final = "pictures listed but not found (item kept without picture)"
TOO_LARGE: Final = "pictures above {:,} pixels (item kept; extraction refuses the picture)"
NO_PICTURE: Final = "picture files that are no picture (item kept; extraction gives the reason)"


class PictureLimits(BaseModel, frozen=True, extra="forbid"):
    """What is looked at while pictures are hashed."""

    max_pixels: PositiveInt = Field(
        50_000_000,
        description="Pictures with more pixels are counted; width and height are read from the header.",
    )
    n_threads: PositiveInt = Field(8, description="Pictures read at the same time.")


@dataclass(frozen=True)
class _Looked:
    """What reading one picture file found."""

    digest: str | None
    """SHA-256 of the bytes; None where there is no file."""
    problem: str = ""


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
        limits: Sizes to count and how many threads read.
        progress: Told after each picture.

    Returns:
        The items with ``image_hash``; an item whose picture is not found has neither image nor hash. And the counts.

    Raises:
        DatasetError: A path leaves ``image_root``, or a picture is there and cannot be read.
    """
    limits = limits or PictureLimits()
    images = items["image"].to_list() if "image" in items.columns else [None] * len(items)
    check_inside(image_root, [image for image in images if image is not None])
    looked = list(_look(image_root, images, limits, progress))
    counts = {
        NO_FILE: sum(
            image is not None and look.digest is None for image, look in zip(images, looked, strict=True)
        ),
        TOO_LARGE.format(limits.max_pixels): sum(look.problem == "large" for look in looked),
        NO_PICTURE: sum(look.problem == "no picture" for look in looked),
    }
    digests = pl.Series("image_hash", [look.digest for look in looked], dtype=pl.String)
    kept = pl.Series("image", images, dtype=pl.String).zip_with(
        digests.is_not_null(), pl.Series("image", [None] * len(items), dtype=pl.String)
    )
    return items.with_columns(kept, digests), {name: count for name, count in counts.items() if count}


def with_picture_hashes(
    dataset: RawDataset, limits: PictureLimits | None = None, progress: Progress | None = None
) -> RawDataset:
    """The dataset with ``image_hash`` and with the counts of ``hash_pictures`` added to its drops."""
    items, counts = hash_pictures(dataset.items, dataset.image_root, limits, progress)
    return RawDataset(
        items, dataset.interactions, dataset.image_root, {**dataset.drops, **counts}, dataset.given_features
    )


def check_inside(image_root: str, images: Sequence[str]) -> None:
    """Refuse paths that lead out of the folder of pictures.

    Raises:
        DatasetError: A path is absolute or climbs out by ``..``; or a local one is a link to a place outside.
    """
    outside = [image for image in images if not _is_inside(image_root, image)]
    if outside:
        raise DatasetError(
            f"{len(outside):,} picture paths leave the folder {image_root or '(none given)'}: {few(outside)}. "
            "Give paths relative to it, without '..'; or name a folder that holds all pictures."
        )


def is_remote(root: str) -> bool:
    """Whether a root is an fsspec URL and not a local folder."""
    return "://" in root


def read_picture(image_root: str, image: str) -> bytes | None:
    """The bytes of a picture, or None where there is no such file."""
    try:
        if is_remote(image_root):
            with fsspec.open(f"{image_root.rstrip('/')}/{image}", "rb") as stream:
                content: bytes = stream.read()
                return content
        return (Path(image_root) / image).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise DatasetError(
            f"The picture {image!r} in {image_root} cannot be read: {error}. Make it readable or remove it."
        ) from error


def _look(
    image_root: str, images: Sequence[str | None], limits: PictureLimits, progress: Progress | None
) -> Iterator[_Looked]:
    def look(image: str | None) -> _Looked:
        content = None if image is None else read_picture(image_root, image)
        if content is None:
            return _Looked(None)
        return _Looked(hashlib.sha256(content).hexdigest(), _problem(content, limits.max_pixels))

    with ThreadPoolExecutor(limits.n_threads) as pool, warnings.catch_warnings():
        # Pillow warns of large pictures; we count them, against our own limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for done, looked in enumerate(pool.map(look, images), start=1):
            if progress is not None:
                progress(done, len(images))
            yield looked


def _problem(content: bytes, max_pixels: int) -> str:
    """Look at the header only: no pixel is decoded."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return "large" if picture.width * picture.height > max_pixels else ""
    except Image.DecompressionBombError:
        return "large"
    except (
        OSError,
        ValueError,
        SyntaxError,
    ):  # what Pillow's format readers raise for bytes that are no picture
        return "no picture"


def _is_inside(image_root: str, image: str) -> bool:
    path = PurePosixPath(image.replace("\\", "/"))
    if not image or not image_root or path.is_absolute() or ".." in path.parts or "\0" in image:
        return False
    if is_remote(image_root):
        return True
    root = Path(image_root).resolve()
    return (root / image).resolve().is_relative_to(root)
