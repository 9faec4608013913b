"""Random crops and mirrors of training pictures, drawn from the picture itself and a seed."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from features.encoders.base import ImageTransform
from features.finetuning.config import AugmentConfig


@dataclass(frozen=True)
class Augmented:
    """An encoder's transform behind a random crop and mirror. Picklable where the transform is.

    What is drawn depends on the picture's content and ``seed`` alone, so that it is the same whichever worker
    loads the picture and in whatever order; an epoch takes a seed of its own.

    Args:
        transform: The encoder's.
        config: What may be drawn.
        seed: Of this epoch.
    """

    transform: ImageTransform
    config: AugmentConfig
    seed: int

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, H, W) float32."""
        return self.transform(self.augment(image))

    def augment(self, image: Image.Image) -> Image.Image:
        """The picture that the encoder's transform is handed."""
        config = self.config
        if config.crop_least_area == 1 and config.flip == 0:
            return image
        rng = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        area, aspect, left, top, mirror = rng.random(5)
        if config.crop_least_area < 1:
            image = image.crop(self._box(image.size, area, aspect, left, top))
        return ImageOps.mirror(image) if mirror < config.flip else image

    def _box(
        self, size: tuple[int, int], area: float, aspect: float, left: float, top: float
    ) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a crop; all arguments but the size are drawn from 0..1.

        The crop's proportions are the picture's, stretched by up to `crop_aspect` as far as it fits.
        """
        share = self.config.crop_least_area + area * (1 - self.config.crop_least_area)
        most = min(math.log(self.config.crop_aspect), -math.log(share)) / 2
        stretch = math.exp(most * (2 * aspect - 1))
        width = max(1, round(size[0] * math.sqrt(share) * stretch))
        height = max(1, round(size[1] * math.sqrt(share) / stretch))
        width, height = min(width, size[0]), min(height, size[1])
        x, y = round(left * (size[0] - width)), round(top * (size[1] - height))
        return x, y, x + width, y + height
