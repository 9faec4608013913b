"""The demo dataset: a rendered catalogue and simulated users, a pure function of its configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from pydantic import BaseModel, Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from pipeline.datasets.base import RawDataset
from pipeline.datasets.demo_rendering import render_product
from pipeline.datasets.demo_texts import write_text
from pipeline.datasets.demo_traits import ProductTraits, draw_traits
from pipeline.datasets.demo_users import Float32Array, choose, interaction_table, utilities

GENERATOR = 2
"""Raised whenever the same configuration would give another dataset."""


class DemoConfig(BaseModel, frozen=True, extra="forbid"):
    """The rendered catalogue: what users choose depends on the looks and on the texts, about half on each."""

    seed: NonNegativeInt = Field(0, description="Another seed is another catalogue with other users.")
    n_items: PositiveInt = Field(1000, description="Products.")
    n_users: PositiveInt = Field(1500, description="Simulated users.")
    image_size_px: int = Field(96, ge=16, le=1024, description="Width and height of the pictures.")
    fewest_choices: PositiveInt = Field(12, description="Smallest number of products a user chooses.")
    most_choices: PositiveInt = Field(25, description="Largest number of products a user chooses.")
    missing_image_share: float = Field(0.04, ge=0, le=0.5, description="Share of products without a picture.")
    missing_text_share: float = Field(
        0.04,
        ge=0,
        le=0.5,
        description="Share of products without title and description; never those without picture.",
    )

    @model_validator(mode="after")
    def _choices_fit(self) -> DemoConfig:
        if not self.fewest_choices <= self.most_choices <= self.n_items:
            raise ValueError("expected fewest_choices <= most_choices <= n_items")
        return self


def demo_identity(config: DemoConfig) -> JsonValue:
    """All that the dataset depends on: the configuration and the version of the generator."""
    return {"generator": GENERATOR, **config.model_dump(mode="json")}


def demo_traits(config: DemoConfig) -> ProductTraits:
    """The hidden traits of the catalogue's products."""
    return draw_traits(config.n_items, _stream(config, "traits"))


def demo_utilities(config: DemoConfig) -> Float32Array:
    """The right answer: (U, I) utility of each product to each user, row u of the user ``user-<u>``."""
    return utilities(demo_traits(config), config.n_users, _stream(config, "tastes"))


def import_demo(config: DemoConfig, folder: Path) -> RawDataset:
    """Render the catalogue and simulate its users.

    Args:
        config: Sizes and seed.
        folder: Where the pictures are written, as ``<item id>.jpg``.
    """
    traits = demo_traits(config)
    item_ids = [f"item-{row:05d}" for row in range(config.n_items)]
    without_image, without_text = _missing(config)

    folder.mkdir(parents=True, exist_ok=True)
    images: list[str | None] = []
    titles: list[str | None] = []
    descriptions: list[str | None] = []
    for row, item_id in enumerate(item_ids):
        # A stream per product and purpose, so that a missing picture or text does not change its neighbours.
        picture_rng, text_rng = (_stream(config, purpose, row) for purpose in ("pictures", "texts"))
        if row in without_image:
            images.append(None)
        else:
            picture = render_product(traits.of(row), picture_rng, config.image_size_px)
            images.append(f"{item_id}.jpg")
            picture.save(folder / f"{item_id}.jpg", quality=92, subsampling=0)
        text = None if row in without_text else write_text(traits.of(row), text_rng)
        titles.append(text.title if text else None)
        descriptions.append(text.description if text else None)

    choices = choose(
        demo_utilities(config), config.fewest_choices, config.most_choices, _stream(config, "choices")
    )
    items = pl.DataFrame(
        {"item_id": item_ids, "title": titles, "description": descriptions, "image": images},
        schema={"item_id": pl.String, "title": pl.String, "description": pl.String, "image": pl.String},
    )
    drops = {"items without a picture": len(without_image), "items without a text": len(without_text)}
    return RawDataset(items, interaction_table(choices, item_ids), image_root=str(folder), drops=drops)


def _missing(config: DemoConfig) -> tuple[set[int], set[int]]:
    """The rows without a picture, and the rows without a text; no row is in both."""
    shuffled = _stream(config, "missing").permutation(config.n_items)
    n_images = round(config.missing_image_share * config.n_items)
    n_texts = round(config.missing_text_share * config.n_items)
    return set(shuffled[:n_images].tolist()), set(shuffled[n_images : n_images + n_texts].tolist())


_PURPOSES = ("traits", "tastes", "choices", "missing", "pictures", "texts")


def _stream(config: DemoConfig, purpose: str, row: int = 0) -> np.random.Generator:
    """The random numbers of one purpose; a new draw in one leaves the others alone."""
    return np.random.default_rng([config.seed, _PURPOSES.index(purpose), row])
