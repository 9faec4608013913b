"""An RGB picture -> the numbers of transformers' own image processors."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from features.encoders.base import ImageTransform
from features.encoders.pixels import PixelConfig, PixelTransform, aspect_that_fits, keep_middle
from features.encoders.transformers_files import PROCESSOR_FILES, ModelFiles, first_line, quiet
from features.errors import EncoderError

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that `PixelConfig` knows."""

_PROBES = ((40, 60), (90, 30), (33, 33))
"""Sizes of pictures that show what shape a processor gives."""


@dataclass(frozen=True)
class ProcessorTransform:
    """transformers' own processor; the backend that resizes with Pillow, where there is one.

    Args:
        kind: Its class in transformers.
        settings: All of its settings, as JSON.
        most_aspect: As for `keep_middle`.
    """

    kind: str
    settings: str
    most_aspect: int = 0

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, H, W) float32."""
        picture = keep_middle(image.convert("RGB"), self.most_aspect)
        given = _processor(self.kind, self.settings)(picture, return_tensors="pt")
        if "spatial_shapes" in given:
            return pack_patches(given["pixel_values"][0], given["spatial_shapes"][0])
        pixels: Tensor = given["pixel_values"][0]
        return pixels.float()


def pack_patches(patches: Tensor, shape: Tensor) -> Tensor:
    """Patches of a picture that keeps its aspect (SigLIP 2's NaFlex), as one tensor.

    Args:
        patches: (P, p * p * 3), zeros behind the last one.
        shape: Rows and columns of patches.

    Returns:
        (3, P + 1, p * p): a channel's patches, then a row that starts with rows and columns.
    """
    by_channel = patches.float().reshape(len(patches), -1, 3).permute(2, 0, 1)
    last = by_channel.new_zeros(3, 1, by_channel.shape[2])
    last[:, 0, :2] = shape.to(last.dtype)
    return torch.cat([by_channel, last], dim=1)


def unpack_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack_patches` packed, for a batch: (B, P, p * p * 3), mask (B, P) and shapes (B, 2)."""
    shapes = pixels[:, 0, -1, :2].round().long()
    patches = pixels[:, :, :-1].permute(0, 2, 3, 1).flatten(2)
    places = torch.arange(patches.shape[1], device=pixels.device)
    return patches, (places < shapes.prod(dim=1, keepdim=True)).int(), shapes


def image_transform(files: ModelFiles) -> tuple[ImageTransform, int]:
    """How pictures are prepared, and the side of the square that comes of it.

    Our own transform where it gives the same numbers bit for bit and is faster; else the library's processor.

    Raises:
        EncoderError: No settings of a processor, or it gives pictures of different shapes.
    """
    import transformers  # noqa: PLC0415 - seconds of imports

    auto: Any = transformers.AutoImageProcessor

    folder = files.need(PROCESSOR_FILES, "image processor").parent
    try:
        with quiet():
            processor = auto.from_pretrained(
                str(folder), backend="pil", trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # each processor checks itself in its own way
        raise EncoderError(
            f"encoder {files.spec!r}: no image processor can be made of {str(folder)!r} "
            f"({first_line(error)}); check {PROCESSOR_FILES[0]}."
        ) from error
    config = _as_squash(processor)
    if config is not None:
        return PixelTransform(config), config.size_px
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    size = getattr(processor, "size", None) or {}
    enlarged = int(size["shortest_edge"] or 0) if "shortest_edge" in size else 0
    aspect = aspect_that_fits(enlarged) if enlarged else 0
    transform = ProcessorTransform(type(processor).__name__, settings, aspect)
    return transform, _side(files, transform)


def transform_settings(transform: ImageTransform) -> dict[str, Any]:
    """What of a transform changes its numbers."""
    if isinstance(transform, PixelTransform):
        return {"kind": "squash", **transform.config.model_dump(mode="json")}
    if isinstance(transform, ProcessorTransform):
        return {"kind": transform.kind, "settings": transform.settings}
    raise TypeError(f"{type(transform).__name__} is no transform of this family.")


def _side(files: ModelFiles, transform: ProcessorTransform) -> int:
    """Side of the square that comes out, whatever picture goes in."""
    try:
        shapes = {tuple(transform(Image.new("RGB", size)).shape) for size in _PROBES}
    except Exception as error:  # each processor checks itself in its own way
        raise EncoderError(
            f"encoder {files.spec!r}: its {transform.kind} prepares no picture ({first_line(error)}); check "
            f"{PROCESSOR_FILES[0]}."
        ) from error
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != 3:
        raise EncoderError(
            f"encoder {files.spec!r}: its {transform.kind} gives pictures of different shapes; expected one "
            f"shape for all. Set size and crop_size in {PROCESSOR_FILES[0]}."
        )
    settings = json.loads(transform.settings)
    if "max_num_patches" in settings:
        return int(settings["patch_size"]) * math.isqrt(settings["max_num_patches"])
    if shape[1] != shape[2]:
        raise EncoderError(
            f"encoder {files.spec!r}: its {transform.kind} gives {shape[1]} x {shape[2]} pixels; only "
            "squares are supported."
        )
    return int(shape[1])


def _as_squash(processor: Any) -> PixelConfig | None:
    """The settings of a processor that only resizes both sides, scales by 1/255 and normalises; else None."""
    from transformers.image_processing_backends import PilBackend  # noqa: PLC0415 - seconds of imports

    plain = ("_preprocess", "resize", "rescale", "normalize", "process_image")
    kind = type(processor)
    if not issubclass(kind, PilBackend):
        return None
    if any(getattr(kind, name) is not getattr(PilBackend, name) for name in plain):
        return None
    size = dict(processor.size or {})
    given = {name for name, value in size.items() if value}
    squash = given == {"height", "width"} and size["height"] == size["width"]
    steps = processor.do_resize and processor.do_rescale and processor.do_normalize
    more = getattr(processor, "do_center_crop", None) or getattr(processor, "do_pad", None)
    scaled = processor.rescale_factor == 1 / 255
    resample = _FILTERS.get(int(processor.resample)) if processor.resample is not None else None
    channels = (tuple(processor.image_mean or ()), tuple(processor.image_std or ()))
    if not (
        squash and steps and not more and scaled and resample and all(len(each) == 3 for each in channels)
    ):
        return None
    return PixelConfig.model_validate(
        {
            "size_px": size["height"],
            "mean": channels[0],
            "std": channels[1],
            "interpolation": resample,
            "resize_mode": "squash",
        }
    )


@lru_cache(maxsize=8)
def _processor(kind: str, settings: str) -> Any:
    import transformers  # noqa: PLC0415 - seconds of imports

    return getattr(transformers, kind).from_dict(json.loads(settings))
