"""Pictures and captions that ``tiny`` is trained on: every trait shows in pictures and in words.

The catalogue keeps looks and texts apart, and contrastive training learns only what both sides share. So the
training set holds more than a catalogue does. Product pictures look like those of the catalogue, but their
captions name the looks. The texts are those of the catalogue, but their pictures are labels, which show
brand, material and use. A caption also tells now and then of what its picture does not show, as a shop's
text does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.datasets.demo_rendering import render_label, render_product
from pipeline.datasets.demo_texts import write_caption, write_text
from pipeline.datasets.demo_traits import ALL_TRAITS, TEXT_TRAITS, VISUAL_TRAITS

LABEL_SHARE = 0.25
"""Share of the pictures that are labels; looks are harder to learn, so most are products."""
NAMED_SHARE = 0.9
"""Chance of a trait that the picture shows to be named in a caption that is no text of the catalogue."""
UNSEEN_SHARE = 0.1
"""Chance of a trait that the picture does not show to be named in such a caption."""
CATALOGUE_TEXT_SHARE = 0.7
"""Share of a label's captions that are texts of the catalogue."""


@dataclass(frozen=True)
class TrainingProduct:
    """A product of no catalogue, its picture or its label."""

    picture: Image.Image
    traits: dict[str, int]
    is_label: bool

    def caption(self, rng: np.random.Generator) -> str:
        """One of the many captions of this product."""
        if self.is_label and rng.random() < CATALOGUE_TEXT_SHARE:
            text = write_text(self.traits, rng)
            return f"{text.title} {text.description}"
        shown = TEXT_TRAITS if self.is_label else VISUAL_TRAITS
        named = {
            trait.name
            for trait in ALL_TRAITS
            if rng.random() < (NAMED_SHARE if trait in shown else UNSEEN_SHARE)
        }
        return write_caption(self.traits, named or {shown[0].name}, rng)


def training_product(seed: int, row: int, size_px: int) -> TrainingProduct:
    """Draw product ``row`` of the training set ``seed`` and render it; a pure function of its arguments."""
    rng = np.random.default_rng([seed, row])
    traits = {trait.name: int(rng.integers(len(trait.values))) for trait in ALL_TRAITS}
    is_label = bool(rng.random() < LABEL_SHARE)
    render = render_label if is_label else render_product
    return TrainingProduct(render(traits, rng, size_px), traits, is_label)
