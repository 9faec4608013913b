"""Draws a product of the demo catalogue: a shape in a colour, with pattern and texture, before a background.

Everything is drawn with distance functions on a grid of points: negative inside, about the distance to the
edge, so that a soft threshold gives clean edges at any size. Coordinates run from -1 to 1, x to the right and
y down.

A product's picture shows its looks and never its brand, material or use. These are shown by a label, a
picture of its own kind, that only the pairs ``tiny`` is trained on have.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]  # (H, W)
Colour = NDArray[np.float32]  # (3,), each from 0 to 1
Canvas = NDArray[np.float32]  # (H, W, 3)


def render_product(traits: Mapping[str, int], rng: np.random.Generator, size_px: int) -> Image.Image:
    """Draw one product.

    Args:
        traits: Trait name -> value; only the visual traits are read.
        rng: Draws what does not matter: place, size, turn, shade, grain.
        size_px: Width and height.

    Returns:
        An RGB picture of ``size_px`` x ``size_px``.
    """
    x, y = _grid(size_px)
    pixel = 2.0 / size_px
    canvas = _background(traits["background"], x, y, rng)

    centre_x, centre_y = rng.uniform(-0.06, 0.06, size=2)
    radius = rng.uniform(0.62, 0.72)
    turn = rng.uniform(-0.12, 0.12)
    u = ((x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)) / radius
    v = ((y - centre_y) * np.cos(turn) - (x - centre_x) * np.sin(turn)) / radius
    shape = _SHAPES[traits["shape"]]
    shadow = _inside(shape(u - 0.08, v - 0.12), 0.25)
    canvas *= 1.0 - 0.35 * shadow[:, :, None]

    main, second = _colours(traits["colour"], rng)
    painted = main + (second - main) * _pattern(traits["pattern"], u, v, rng)[:, :, None]
    painted = _textured(traits["texture"], painted, u, v, rng)
    canvas += (painted - canvas) * _inside(shape(u, v), pixel / radius)[:, :, None]

    return _picture(canvas)


def render_label(traits: Mapping[str, int], rng: np.random.Generator, size_px: int) -> Image.Image:
    """Draw the label of a product: a mark for its brand, a weave for its material, an icon for its use.

    Args:
        traits: Trait name -> value; only the text traits are read.
        rng: Draws place and shade.
        size_px: Width and height.

    Returns:
        An RGB picture of ``size_px`` x ``size_px``, three fields side by side on light paper.
    """
    x, y = _grid(size_px)
    paper = rng.uniform(0.85, 1.0)
    canvas = np.full((*x.shape, 3), paper, dtype=np.float32)
    shift_x, shift_y = rng.uniform(-0.05, 0.05), rng.uniform(-0.15, 0.15)
    signs = (("brand", _brand_mark), ("material", _weave), ("use", _use_icon))
    for column, (name, sign) in enumerate(signs):
        u, v = (x - shift_x - 0.62 * (column - 1)) / 0.28, (y - shift_y) / 0.28
        field = np.maximum(np.abs(u), np.abs(v) / 2.2) < 1.0
        canvas[field] = _label_colour(traits[name], rng)
        canvas[field & sign(traits[name], u, v)] = 1.0
    return _picture(canvas)


def _picture(canvas: Canvas) -> Image.Image:
    return Image.fromarray((np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), mode="RGB")


@functools.lru_cache(maxsize=4)
def _grid(size_px: int) -> tuple[Plane, Plane]:
    """The x and y of every pixel's middle, each (H, W)."""
    middles = ((np.arange(size_px, dtype=np.float32) + 0.5) * 2.0 / size_px - 1.0).astype(np.float32)
    x, y = np.meshgrid(middles, middles)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def _inside(distance: Plane, softness: float) -> Plane:
    """1 inside, 0 outside, and a ramp as wide as ``softness`` in between."""
    covered: Plane = np.clip(0.5 - distance / softness, 0.0, 1.0)
    return covered


# Shapes: the distance to the edge of a shape of about radius 1.


def _half_planes(x: Plane, y: Plane, n: int, first: float, distance: float) -> Plane:
    """A regular polygon of ``n`` edges, its first normal at angle ``first``."""
    angles = first + 2.0 * np.pi * np.arange(n) / n
    result = x * np.float32(np.cos(angles[0])) + y * np.float32(np.sin(angles[0]))
    for angle in angles[1:]:
        result = np.maximum(result, x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    return result - np.float32(distance)


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - np.float32(0.95)


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _square(x: Plane, y: Plane) -> Plane:
    return _box(x, y, 0.85, 0.85)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _half_planes(x, y - np.float32(0.15), 3, np.pi / 2, 0.6)


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: the plane folded into one half point, and the line from its tip to its notch."""
    angle = np.arctan2(x, -y)
    fifth = 2.0 * np.pi / 5.0
    folded = np.abs((angle + fifth / 2.0) % fifth - fifth / 2.0)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    tip, notch = 1.15, 0.5
    notch_along, notch_across = notch * np.cos(fifth / 2.0), notch * np.sin(fifth / 2.0)
    length = np.hypot(tip - notch_along, notch_across)
    star: Plane = ((along - tip) * notch_across + across * (tip - notch_along)) / length
    return star


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner, with a disc on each of its upper edges."""
    half = 0.58
    diagonal = np.float32(np.sqrt(0.5))
    down = y - np.float32(0.1)
    corner = _box((x + down) * diagonal, (x - down) * diagonal, half, half)
    offset = half * np.sqrt(0.5)
    left = np.hypot(x + offset, down + offset) - half
    right = np.hypot(x - offset, down + offset) - half
    heart: Plane = np.minimum(corner, np.minimum(left, right))
    return heart


def _hexagon(x: Plane, y: Plane) -> Plane:
    return _half_planes(x, y, 6, np.pi / 6, 0.88)


def _crescent(x: Plane, y: Plane) -> Plane:
    crescent: Plane = np.maximum(np.hypot(x, y) - 1.0, 0.72 - np.hypot(x - 0.5, y))
    return crescent


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 0.95, 0.34), _box(x, y, 0.34, 0.95))


_SHAPES: Final[tuple[Callable[[Plane, Plane], Plane], ...]] = (
    _disc,
    _square,
    _triangle,
    _star,
    _heart,
    _hexagon,
    _crescent,
    _cross,
)

# Colour, pattern, texture, background.

_HUES: Final = (0.0, 0.075, 0.15, 0.33, 0.475, 0.61, 0.76, 0.91)


def _colours(colour: int, rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A product's main colour, and a much lighter or darker one of the same hue for its pattern."""
    hue = (_HUES[colour] + rng.uniform(-0.015, 0.015)) % 1.0
    saturation, value = rng.uniform(0.75, 0.95), rng.uniform(0.75, 0.95)
    lighter = bool(rng.random() < 0.5)
    second = (hue, saturation * 0.15, 1.0) if lighter else (hue, saturation, value * 0.3)
    main = np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32)
    return main, np.array(colorsys.hsv_to_rgb(*second), dtype=np.float32)


def _pattern(pattern: int, u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    """How much of the second colour shows at each point."""
    wave = 2.0 * np.pi / rng.uniform(0.68, 0.8)
    shift_u, shift_v = rng.uniform(0.0, 2.0 * np.pi, size=2)
    across, down = u * np.float32(wave) + np.float32(shift_u), v * np.float32(wave) + np.float32(shift_v)
    if pattern == 0:  # plain
        return np.zeros_like(u)
    if pattern == 1:  # striped
        signal = np.sin(across)
    elif pattern == 2:  # dotted
        signal = np.cos(across) + np.cos(down) - 0.75
    elif pattern == 3:  # chequered
        signal = np.sin(across) * np.sin(down) * 2.0
    elif pattern == 4:  # zigzag
        signal = np.sin(down + 2.2 * np.abs(across / np.pi % 2.0 - 1.0))
    else:  # ringed
        signal = np.sin(np.hypot(u, v) * wave + shift_u)
    shown: Plane = np.clip(0.5 + 2.0 * signal, 0.0, 1.0).astype(np.float32)
    return shown


def _textured(texture: int, painted: Canvas, u: Plane, v: Plane, rng: np.random.Generator) -> Canvas:
    """Lay a surface over the paint."""
    height, width = u.shape
    if texture == 1:  # grainy: blotches of a thirtieth of the picture
        coarse = rng.uniform(-0.55, 0.55, size=(32, 32)).astype(np.float32)
        rows, columns = np.arange(height) * 32 // height, np.arange(width) * 32 // width
        return _shaded(painted, coarse[rows][:, columns])
    if texture == 2:  # streaky: lines of uneven brightness
        lines = rng.uniform(-0.5, 0.5, size=32).astype(np.float32)
        return _shaded(painted, lines[np.arange(height) * 32 // height][:, None])
    if texture == 3:  # glossy: a bright spot at the upper left and a darker lower edge
        spot = np.exp(-((u + 0.3) ** 2 + (v + 0.35) ** 2) / np.float32(0.12))[:, :, None]
        dimmed = _shaded(painted, -0.35 * np.clip(v, 0.0, 1.0))
        return dimmed + (1.0 - dimmed) * np.float32(0.9) * spot
    return painted


def _shaded(painted: Canvas, change: Plane) -> Canvas:
    """Make the paint lighter or darker by a share at each point, or by one number a row."""
    shaded: Canvas = painted * (1.0 + change)[:, :, None]
    return shaded


def _background(background: int, x: Plane, y: Plane, rng: np.random.Generator) -> Canvas:
    """A new canvas (H, W, 3)."""
    light = np.float32(1.0 + rng.uniform(-0.04, 0.02))
    canvas = np.empty((*x.shape, 3), dtype=np.float32)
    if background == 0:  # white
        canvas[:] = (0.97, 0.97, 0.97)
    elif background == 1:  # sand
        canvas[:] = (0.86, 0.78, 0.62)
    elif background == 2:  # dusk
        canvas[:] = (0.24, 0.25, 0.34)
    elif background == 3:  # gradient, light at the top
        fade = (0.5 + 0.5 * y)[:, :, None]
        canvas[:] = np.array((0.9, 0.93, 0.97), dtype=np.float32) * (1.0 - 0.65 * fade)
    elif background == 4:  # tiled
        canvas[:] = (0.84, 0.88, 0.86)
        shift = rng.uniform(0.0, 0.4)
        lines = (np.abs((x + shift) % 0.4 - 0.2) < 0.03) | (np.abs((y + shift) % 0.4 - 0.2) < 0.03)
        canvas[lines] = (0.55, 0.6, 0.58)
    else:  # shelf: a wall, and a board below
        canvas[:] = (0.9, 0.88, 0.84)
        canvas[y > rng.uniform(0.35, 0.5)] = (0.52, 0.37, 0.25)
    return canvas * light


# Signs of the text traits, in a field whose width runs from -1 to 1.

_BRAND_MARKS: Final = (
    "111100111",
    "101010101",
    "111010010",
    "100110111",
    "010111010",
    "101101111",
    "111001001",
    "011010110",
)
"""Three rows of three cells, 1 is ink."""


def _label_colour(value: int, rng: np.random.Generator) -> Colour:
    """What a sign is drawn on: every brand, material and use has its own colour."""
    hue = (value / 8.0 + rng.uniform(-0.02, 0.02)) % 1.0
    return np.array(colorsys.hsv_to_rgb(hue, 0.9, rng.uniform(0.5, 0.7)), dtype=np.float32)


def _brand_mark(brand: int, u: Plane, v: Plane) -> NDArray[np.bool_]:
    ink = np.array([cell == "1" for cell in _BRAND_MARKS[brand]]).reshape(3, 3)
    column, row = np.floor(u / 0.5 + 1.5).astype(int), np.floor(v / 0.5 + 1.5).astype(int)
    within = (column >= 0) & (column < 3) & (row >= 0) & (row < 3)
    marked: NDArray[np.bool_] = within & ink[np.clip(row, 0, 2), np.clip(column, 0, 2)]
    return marked


def _weave(material: int, u: Plane, v: Plane) -> NDArray[np.bool_]:
    """One of eight regular surfaces."""
    across, down = u % 0.7 < 0.3, v % 0.7 < 0.3
    weaves = (
        across,
        down,
        across | down,
        across & down,
        across ^ down,
        (u + v) % 0.9 < 0.35,
        (u - v) % 0.9 < 0.35,
        np.abs(v) < 0.5,
    )
    return weaves[material]


def _use_icon(use: int, u: Plane, v: Plane) -> NDArray[np.bool_]:
    """An icon of radius 1 in one of eight forms."""
    radius = np.hypot(u, v)
    flat, upright = np.abs(v) < 0.25, np.abs(u) < 0.25
    rising, falling = np.abs(u + v) < 0.35, np.abs(u - v) < 0.35
    forms = (
        flat,
        upright,
        flat | upright,
        rising | falling,
        radius > 0.55,
        radius < 0.5,
        np.abs(np.abs(v) - 0.5) < 0.2,
        rising,
    )
    icon: NDArray[np.bool_] = forms[use] & (radius < 0.95)
    return icon
