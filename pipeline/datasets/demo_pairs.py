"""Pictures and captions that ``tiny`` is trained on: every trait can show in the picture and in the words.

The catalogue keeps looks and texts apart, and contrastive training learns only what both sides share. So its
training pairs show more than the catalogue does: pictures carry signs of brand, material and use, captions
name the looks. Which traits a side tells of is drawn anew for each pair, and in a good part of them a side
tells just what the catalogue would, so that the towers also cope with that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.datasets.demo_rendering import SIGNS, render_product
from pipeline.datasets.demo_texts import write_caption, write_text
from pipeline.datasets.demo_traits import ALL_TRAITS, VISUAL_TRAITS

ALL_SIGNS_SHARE = 0.7
"""Share of the pictures that show every sign; of the others, each sign shows in half."""
NAMED_SHARE = 0.8
"""Chance of each trait to be named in a caption."""
CATALOGUE_TEXT_SHARE = 0.25
"""Share of the captions that are a text of the catalogue."""
LOOKS_ONLY_SHARE = 0.15
"""Share of the captions that name looks only, as someone would who searches by words."""


@dataclass(frozen=True)
class TrainingProduct:
    """A product of no catalogue: its picture shows some of its traits, its captions name some."""

    picture: Image.Image
    traits: dict[str, int]

    def caption(self, rng: np.random.Generator) -> str:
        """One of the many captions of this product."""
        style = rng.random()
        if style < CATALOGUE_TEXT_SHARE:
            text = write_text(self.traits, rng)
            return f"{text.title} {text.description}"
        if style < CATALOGUE_TEXT_SHARE + LOOKS_ONLY_SHARE:
            return write_caption(self.traits, _some([trait.name for trait in VISUAL_TRAITS], rng), rng)
        return write_caption(self.traits, _some([trait.name for trait in ALL_TRAITS], rng), rng)


def training_product(seed: int, row: int, size_px: int) -> TrainingProduct:
    """Draw product ``row`` of the training set ``seed`` and render it; a pure function of its arguments."""
    rng = np.random.default_rng([seed, row])
    traits = {trait.name: int(rng.integers(len(trait.values))) for trait in ALL_TRAITS}
    signs = SIGNS if rng.random() < ALL_SIGNS_SHARE else tuple(sign for sign in SIGNS if rng.random() < 0.5)
    return TrainingProduct(render_product(traits, rng, size_px, signs), traits)


def _some(names: list[str], rng: np.random.Generator) -> Collection[str]:
    """Most of the names, at least one."""
    kept = {name for name in names if rng.random() < NAMED_SHARE}
    return kept or {names[int(rng.integers(len(names)))]}
