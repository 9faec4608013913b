"""The hidden causes of the demo: what a product looks like, and what its text says of it.

Pictures show the visual traits only, texts name the text traits only, and the two are drawn independently of
each other. So an encoder of one modality cannot know what the other one tells, and a recommender needs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Trait:
    """A property of a product with a few values."""

    name: str
    values: tuple[str, ...]
    weight: float
    """How much it matters to users, relative to the other traits of its modality."""


VISUAL_TRAITS: Final = (
    Trait("shape", ("disc", "square", "triangle", "star", "heart", "hexagon", "crescent", "cross"), 1.0),
    Trait("colour", ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink"), 1.0),
    Trait("pattern", ("plain", "striped", "dotted", "chequered", "zigzag", "ringed"), 0.8),
    Trait("texture", ("smooth", "grainy", "streaky", "glossy"), 0.4),
    Trait("background", ("white", "sand", "dusk", "gradient", "tiled", "shelf"), 0.4),
)
TEXT_TRAITS: Final = (
    Trait(
        "brand",
        ("Norvane", "Almeri", "Tessaro", "Brindlo", "Kestova", "Ostrana", "Pelhaven", "Quillon"),
        1.0,
    ),
    Trait("material", ("oak", "steel", "leather", "linen", "ceramic", "bamboo", "glass", "wool"), 1.0),
    Trait("use", ("kitchen", "travel", "office", "garden", "sport", "bath", "nursery", "party"), 1.0),
)
ALL_TRAITS: Final = (*VISUAL_TRAITS, *TEXT_TRAITS)


@dataclass(frozen=True)
class ProductTraits:
    """The traits of all products: trait name -> (I,) value of each, as a number."""

    values: dict[str, IntArray]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def of(self, row: int) -> dict[str, int]:
        """The traits of one product."""
        return {name: int(values[row]) for name, values in self.values.items()}


def draw_traits(n_items: int, rng: np.random.Generator) -> ProductTraits:
    """Draw the traits of ``n_items`` products: each trait on its own, its values equally often (to one)."""
    values = {}
    for trait in ALL_TRAITS:
        dealt = np.arange(n_items) % len(trait.values)
        values[trait.name] = rng.permutation(dealt).astype(np.int64)
    return ProductTraits(values)
