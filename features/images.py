"""Bytes of a picture -> an RGB picture, or a reason a person understands.

Web catalogues hold everything: error pages named .jpg, half downloads, CMYK scans, 16-bit depth, animations.
A picture is either decoded whole, the way a browser would show it, or refused; never half-decoded.
"""

import io
import os
import stat
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec
import fsspec.core
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field, PositiveInt

IMAGE_DECODING_VERSION = 1
"""Part of every encoder's preprocessing digest: raise it when `open_image` gives other pixels."""

Image.init()  # registers the formats beside the five that Pillow always knows
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What is opened. Of Pillow's others some start programs (EPS), or decode half a file (JPEG 2000)."""

_PILLOW_REFUSES_ABOVE_PIXELS = 178_956_970
"""Twice Pillow's own `MAX_IMAGE_PIXELS`: from here on Pillow raises, whatever our limit says."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.32, tag 274 -> the transposition that makes the picture upright."""


class ImageLimits(BaseModel, frozen=True, extra="forbid"):
    """How large a picture may be; a larger one counts as unreadable and is not decoded."""

    max_pixels: PositiveInt = Field(
        50_000_000,
        le=_PILLOW_REFUSES_ABOVE_PIXELS,
        description="Width times height, read from the header before anything is decoded.",
    )
    max_bytes: PositiveInt = Field(64 * 2**20, description="Size of the file.")


class UnreadableImage(Exception):  # noqa: N818 - the word of the status column, and not a mistake of the program
    """A picture that cannot be encoded; ``reason`` goes beside the item's status."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def open_image(data: bytes, limits: ImageLimits | None = None, *, draft_px: int = 0) -> Image.Image:
    """Decode a picture as a viewer shows it: upright, opaque on white, first frame, 8 bits a channel.

    Args:
        data: The whole file.
        limits: What is too large; the defaults of `ImageLimits` if left out.
        draft_px: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many
            pixels: a quarter of the time and less, and other pixels by a hair. 0: exactly.

    Returns:
        A picture of mode RGB, of its own size unless drafted.

    Raises:
        UnreadableImage: Empty, no picture, truncated or damaged, too large, or in numbers that mean no grey.
    """
    limits = limits or ImageLimits()
    if not data:
        raise UnreadableImage("the file is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise UnreadableImage(f"the file has {len(data):,} bytes; at most {limits.max_bytes:,} are read")
    image = _decode(data, limits, draft_px)
    try:
        return _upright(_to_rgb(image), _orientation(image))
    except (ValueError, OSError) as error:  # a rare mode that Pillow decodes, but knows no way out of
        raise UnreadableImage(
            f"colours of mode {image.mode} are not converted: {_first_line(error)}"
        ) from error


def _decode(data: bytes, limits: ImageLimits, draft_px: int) -> Image.Image:
    """The first frame as it is stored, whole."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, limits)
        if draft_px:
            image.draft(image.mode, (draft_px, draft_px))  # does nothing but for JPEGs
        image.load()
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_what_it_is(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(
            f"more than the {limits.max_pixels:,} pixels that are decoded at most"
        ) from None
    except MemoryError:
        raise UnreadableImage("decoding it takes more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes provoke
        raise UnreadableImage(f"truncated or damaged: {_first_line(error)}") from error
    return image


def read_picture(image_root: str, path: str, limits: ImageLimits | None = None) -> bytes:
    """The bytes of a picture below a folder.

    Args:
        image_root: A local folder or an fsspec URL.
        path: Relative to ``image_root``, with forward slashes.
        limits: The file is not read past `max_bytes`.

    Raises:
        UnreadableImage: No such file, not a plain file, too large, or outside the folder (symbolic links are
            followed first). Errors of a remote file system other than these pass through: they are not the
            picture's fault.
    """
    max_bytes = (limits or ImageLimits()).max_bytes
    inside = PurePosixPath(path)
    if not inside.parts or inside.is_absolute() or ".." in inside.parts or "\0" in path or "\\" in path:
        raise UnreadableImage(f"{path!r} is not a path inside the folder of the pictures")
    try:
        with _open_below(image_root, path) as file:
            return _read_bounded(file, max_bytes)
    except FileNotFoundError:
        raise UnreadableImage(f"there is no file {path!r} in the folder of the pictures") from None
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise UnreadableImage(f"{path!r} cannot be read: {error.strerror or _first_line(error)}") from None


def _open_below(image_root: str, path: str) -> IO[bytes]:
    """Open a file of a local folder or of a remote one; ``path`` is never read as a URL or a pattern."""
    if "://" not in image_root:
        return _open_inside(Path(image_root), path)
    system, root = fsspec.core.url_to_fs(image_root)
    if isinstance(system, LocalFileSystem):
        return _open_inside(Path(root), path)
    remote: IO[bytes] = system.open(f"{root.rstrip('/')}/{path}", "rb")
    return remote


def _open_inside(root: Path, path: str) -> IO[bytes]:
    """Open a plain file whose real place is below the real ``root``."""
    real = (root / path).resolve()
    if not real.is_relative_to(root.resolve()):
        raise UnreadableImage(f"{path!r} leads out of the folder of the pictures")
    handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe must not block
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableImage(f"{path!r} is not a file")
    return os.fdopen(handle, "rb")


def _read_bounded(file: IO[bytes], max_bytes: int) -> bytes:
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableImage(f"the file has more than the {max_bytes:,} bytes that are read at most")
    return data


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    """Refuse from the header alone."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise UnreadableImage(
            f"{width} x {height} = {width * height:,} pixels; at most {limits.max_pixels:,} are decoded"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB before any resizing: resizing palette indices or hidden colours gives other pixels."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey -> 8-bit grey, scaled; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            raise UnreadableImage("float grey outside 0 to 1: no telling what is white")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if values.min() < 0 or values.max() > 65_535:
        raise UnreadableImage("grey of more than 16 bits: no telling what is white")
    grey = (values.astype(np.uint32) * 255 + 32_767) // 65_535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) when there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - Pillow's parser raises whatever the bytes provoke; the pixels are whole
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    transposition = _UPRIGHT.get(orientation)
    return image if transposition is None else image.transpose(transposition)


def _what_it_is(data: bytes) -> str:
    """Say what a file that is no picture looks like."""
    head = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kinds = {
        b"<!doctype html": "an HTML page, not a picture (an error page saved by a download?)",
        b"<html": "an HTML page, not a picture (an error page saved by a download?)",
        b"<svg": "an SVG drawing; export it as PNG",
        b"<?xml": "an XML file (an SVG drawing, or an error from a download?), not a picture",
        b"%pdf": "a PDF document, not a picture",
        b"{": "JSON text, not a picture (an error saved by a download?)",
        b"version https://git-lfs": "a Git LFS pointer; fetch the real file with `git lfs pull`",
    }
    for start, kind in kinds.items():
        if head.startswith(start):
            return f"the file is {kind}"
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")):
        return "truncated or damaged: the header is not whole"
    return f"no picture format that is read ({', '.join(FORMATS)}); it starts with {data[:8].hex(' ')}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
