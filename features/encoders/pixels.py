"""An RGB picture -> the numbers a vision tower was trained on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor

Channels = tuple[float, float, float]

OPENAI_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels CLIP was trained on (Radford et al., 2021, released code)."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_STRIP_ASPECT = 20
"""A picture more than this many times as long as wide is cropped before it is resized."""

_MOST_RESIZED_PX = 2**25
"""A strip may grow to this many pixels before its ends are cut off; of a longer one the middle is kept."""


class PixelConfig(BaseModel, frozen=True, extra="forbid"):
    """How a picture becomes an encoder's input; the names and meanings are open_clip's."""

    size_px: PositiveInt = 224
    mean: Channels = OPENAI_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = Field(
        "shortest",
        description="shortest: that side to size_px, then the middle; longest: that side, then padding; "
        "squash: both sides.",
    )
    fill_color: int = Field(0, ge=0, le=255, description="Grey of the padding of `longest`.")


@dataclass(frozen=True)
class PixelTransform:
    """Resize with Pillow's antialiased filters, then scale; equal to open_clip's transform bit for bit.

    Pillow, as resizing tensors without antialiasing is up to 155/255 off. One exception: of a strip (a banner
    of 1 x 100,000 pixels) the middle is cut out before resizing, where open_clip would first blow it up to
    224 x 22,400,000 pixels.
    """

    config: PixelConfig

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, size_px, size_px) float32."""
        config = self.config
        square = _WAYS[config.resize_mode](image.convert("RGB"), config)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None])


def keep_middle(image: Image.Image, most_aspect: int) -> Image.Image:
    """The middle of a strip; other pictures as they are.

    Args:
        image: Any picture.
        most_aspect: A picture more than this many times as long as wide loses its ends; 0 for no limit.
    """
    short, long = min(image.size), max(image.size)
    kept = short * most_aspect
    if not most_aspect or long <= kept:
        return image
    start = (long - kept) // 2
    box = (start, 0, start + kept, short) if image.width == long else (0, start, short, start + kept)
    return image.crop(box)


def aspect_that_fits(enlarged_px: int) -> int:
    """How long a strip may be, in times its width, if its shorter side is scaled up to ``enlarged_px``."""
    return max(1, _MOST_RESIZED_PX // enlarged_px**2)


def _squash(image: Image.Image, config: PixelConfig) -> Image.Image:
    return _resize(image, config.size_px, config.size_px, config)


def _resize_shortest(image: Image.Image, config: PixelConfig) -> Image.Image:
    """The shorter side to the target, then the middle of the longer one."""
    size = config.size_px
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > _STRIP_ASPECT * short:
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        return image.resize((size, size), _FILTERS[config.interpolation], box=box)
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    resized = _resize(image, new_width, new_height, config)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _resize_longest(image: Image.Image, config: PixelConfig) -> Image.Image:
    """The longer side to the target, then grey bars around the shorter one."""
    size = config.size_px
    ratio = max(image.width, image.height) / size
    width, height = (max(1, round(side / ratio)) for side in image.size)
    resized = _resize(image, width, height, config)
    square = Image.new("RGB", (size, size), (config.fill_color,) * 3)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def _resize(image: Image.Image, width: int, height: int, config: PixelConfig) -> Image.Image:
    return image.resize((width, height), _FILTERS[config.interpolation])


_WAYS = {"shortest": _resize_shortest, "longest": _resize_longest, "squash": _squash}
