"""Writes the texts of the demo catalogue: brand, material and use in shop language, and nothing of the looks.

The captions that ``tiny`` is trained on are written by the same templates, with the looks named beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline.datasets.demo_traits import TEXT_TRAITS, VISUAL_TRAITS

BRANDS: Final = TEXT_TRAITS[0].values

MATERIALS: Final = (
    ("solid oak", "oiled oak wood", "seasoned oak timber"),
    ("stainless steel", "forged steel", "spring steel"),
    ("saddle leather", "full-hide leather", "tanned cowhide"),
    ("washed linen", "pure linen", "woven flax"),
    ("stoneware", "fired ceramic", "kiln-baked clay"),
    ("bamboo", "split bamboo cane", "pressed bamboo"),
    ("recycled glass", "blown glass", "borosilicate glass"),
    ("merino wool", "felted wool", "lambswool"),
)
"""Names of each material, in the order of the trait's values."""

USES: Final = (
    ("the kitchen", "cooking and baking", "everyday cookery"),
    ("travel", "long journeys", "trips and weekends away"),
    ("the office", "desk work", "the study"),
    ("the garden", "planting and pruning", "the allotment"),
    ("sport", "the gym", "training and workouts"),
    ("the bathroom", "bath time", "the washstand"),
    ("the nursery", "babies and toddlers", "small children"),
    ("parties", "birthdays and celebrations", "festive evenings"),
)
"""Names of each use, in the order of the trait's values."""

LOOKS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "shape": (
        ("disc", "round"),
        ("square", "four-sided"),
        ("triangle", "triangular"),
        ("star", "star shaped"),
        ("heart", "heart shaped"),
        ("hexagon", "six-sided"),
        ("crescent", "moon shaped"),
        ("cross", "plus shaped"),
    ),
    "colour": (
        ("red", "crimson"),
        ("orange", "tangerine"),
        ("yellow", "lemon"),
        ("green", "emerald"),
        ("teal", "turquoise"),
        ("blue", "cobalt"),
        ("purple", "violet"),
        ("pink", "magenta"),
    ),
    "pattern": (
        ("plain", "unpatterned"),
        ("striped", "stripes"),
        ("dotted", "polka dots"),
        ("chequered", "checked"),
        ("zigzag", "chevron"),
        ("ringed", "concentric rings"),
    ),
    "texture": (("smooth", "matt"), ("grainy", "speckled"), ("streaky", "brushed"), ("glossy", "shiny")),
    "background": (
        ("on white", "white background"),
        ("on sand", "beige background"),
        ("on dusk", "dark background"),
        ("on a gradient", "fading background"),
        ("on tiles", "tiled background"),
        ("on a shelf", "wooden board below"),
    ),
}
"""How captions name each value of a visual trait; no text of the catalogue may hold one of these words."""

_SERIES: Final = (
    "Alder", "Birch", "Cove", "Dale", "Ember", "Fjord", "Grove", "Haven", "Inlet", "Juno", "Knoll", "Lumen",
    "Mesa", "North", "Orbit", "Pine", "Quest", "Ridge", "Sage", "Tide", "Union", "Vale", "Willow", "Zephyr",
)  # fmt: skip
_NOUNS: Final = ("companion", "essential", "piece", "helper", "favourite", "accessory", "classic", "set")
_TITLES: Final = (
    "{brand} {series} {material} {noun}",
    "{brand} {series} {noun} for {use}",
    "{series} {noun} by {brand}",
    "{material} {noun} {series}, {brand}",
    "{brand} {series}",
    "{series} {noun} for {use}",
)
_MADE: Final = (
    "Made of {material}.",
    "{material} throughout.",
    "Our makers work only with {material}.",
    "The body is {material}.",
    "Crafted from {material}.",
)
_FOR: Final = (
    "Ideal for {use}.",
    "Designed with {use} in mind.",
    "A gift for people who love {use}.",
    "Just right for {use}.",
    "At home wherever {use} comes first.",
)
_BY: Final = (
    "From the {brand} workshop.",
    "{brand} quality since 1987.",
    "By {brand}.",
    "Part of this year's {brand} range.",
    "Another {brand} design.",
)
_EXTRAS: Final = (
    "Two-year guarantee.",
    "Ships within three days.",
    "Free returns.",
    "Comes in a recycled box.",
    "Assembled by hand.",
    "Easy to clean.",
    "Limited edition.",
    "Customers rate it 4.6 of 5.",
    "Spare parts available.",
    "Instructions included.",
)


@dataclass(frozen=True)
class ProductText:
    """What a shop says of one product."""

    title: str
    description: str


def write_text(traits: Mapping[str, int], rng: np.random.Generator) -> ProductText:
    """Write a product's title and description.

    The title names some of brand, material and use; the description names all three, in any order.

    Args:
        traits: Trait name -> value; only the text traits are read.
        rng: Draws words, templates and what does not matter: series, extras.
    """
    words = {
        "brand": BRANDS[traits["brand"]],
        "material": _pick(MATERIALS[traits["material"]], rng),
        "use": _pick(USES[traits["use"]], rng),
        "series": _series(rng),
        "noun": _pick(_NOUNS, rng),
    }
    title = _pick(_TITLES, rng).format(**words)
    # The description has its own choice of words, so that it does not just repeat the title.
    words["material"], words["use"] = (
        _pick(MATERIALS[traits["material"]], rng),
        _pick(USES[traits["use"]], rng),
    )
    sentences = [_pick(templates, rng).format(**words) for templates in (_MADE, _FOR, _BY)]
    sentences += [_EXTRAS[place] for place in rng.permutation(len(_EXTRAS))[: rng.integers(0, 3)]]
    return ProductText(_sentence_case(title), _joined(sentences, rng))


def write_caption(traits: Mapping[str, int], named: Collection[str], rng: np.random.Generator) -> str:
    """Write a training caption that names some traits, the looks among them.

    Args:
        traits: Trait name -> value, all traits.
        named: The traits to name.
        rng: Draws words, order and what does not matter.
    """
    sentences = []
    looks = [
        _pick(LOOKS[trait.name][traits[trait.name]], rng) for trait in VISUAL_TRAITS if trait.name in named
    ]
    if looks:
        if rng.random() < 0.5:
            looks = [looks[place] for place in rng.permutation(len(looks))]
        sentences.append(" ".join(looks))
    words = {
        "brand": BRANDS[traits["brand"]],
        "material": _pick(MATERIALS[traits["material"]], rng),
        "use": _pick(USES[traits["use"]], rng),
    }
    templates = {"brand": _BY, "material": _MADE, "use": _FOR}
    sentences += [_pick(templates[name], rng).format(**words) for name in templates if name in named]
    if rng.random() < 0.5:
        sentences.insert(0, f"{_series(rng)} {_pick(_NOUNS, rng)}")
        sentences += [_EXTRAS[place] for place in rng.permutation(len(_EXTRAS))[: rng.integers(0, 2)]]
    return _joined(sentences, rng)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _series(rng: np.random.Generator) -> str:
    return f"{_pick(_SERIES, rng)} {int(rng.integers(100, 1000))}"


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _joined(sentences: list[str], rng: np.random.Generator) -> str:
    return " ".join(_sentence_case(sentences[place]) for place in rng.permutation(len(sentences)))
