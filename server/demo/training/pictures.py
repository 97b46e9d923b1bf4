"""Pictures with a record of what is where, their backgrounds, and the placing of objects.

Coordinates are pixels, x to the right and y downwards; boxes are (x0, y0, x1, y1).
"""

import io
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from server.demo.drawing import COLORS, Box, Lettering, rgb

Pattern = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

# Pairs of colors that are too similar to be told apart, or to be seen on each other.
_ALIKE = frozenset(
    frozenset(pair.split("/"))
    for pair in [
        "red/brown",
        "orange/brown",
        "orange/yellow",
        "pink/purple",
        "cyan/blue",
        "green/cyan",
        "white/gray",
        "black/gray",
        "brown/black",
        "pink/white",
        "red/orange",
        "pink/red",
        "white/yellow",
        "white/cyan",
        "blue/purple",
        "black/blue",
        "black/purple",
        "green/gray",
        "brown/gray",
        "brown/purple",
        "black/green",
    ]
)
_BACKGROUNDS = (
    *("plain", "plain", "gradient", "grain", "clouds", "stripes", "speckles"),
    *("checks", "waves"),
)
_HELD_OUT_BACKGROUNDS = ("vignette", "dots", "weave", "bokeh")


@dataclass(frozen=True, slots=True)
class Thing:
    """An object, a bar or a line of text, and its facts."""

    box: Box
    facts: Mapping[str, str]
    frame: int = 0  # of a clip


@dataclass(frozen=True, slots=True)
class Glyph:
    """A character. (x, y) is the middle of its box; its width includes the space around it."""

    x: float
    y: float
    width: float
    facts: Mapping[str, str]


def glyphs_of(line: Lettering, x: float, y: float, facts: Mapping[str, str]) -> list[Glyph]:
    """The characters of a text whose ink is drawn at (x, y), numbered from 1, without spaces."""
    start = x - line.ink[0]
    middle = y + line.height / 2
    ends = [line.font.getlength(line.text[: end + 1]) for end in range(len(line.text))]
    glyphs = []
    for index, (left, right) in enumerate(zip([0.0, *ends], ends, strict=False)):
        char = line.text[index]
        if char != " ":
            known = {**facts, "char": char, "index": str(index + 1)}
            glyphs.append(Glyph(start + (left + right) / 2, middle, right - left, known))
    return glyphs


@dataclass(slots=True)
class Picture:
    """A picture, or a clip of frames of one size, and what it shows."""

    frames: list[Image.Image]
    facts: dict[str, str]
    things: list[Thing] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)

    @property
    def image(self) -> Image.Image:
        return self.frames[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.frames[0].size


def alike(one: str, other: str) -> bool:
    """Whether two colors are the same or too similar."""
    return one == other or frozenset((one, other)) in _ALIKE


def contrasting(rng: random.Random, background: str) -> str:
    """The name of a color that is visible on a background."""
    return rng.choice([color for color in COLORS if not alike(color, background)])


def background_color(rng: random.Random) -> str:
    return rng.choice(["white"] * 6 + ["black", "gray", *COLORS])


def background(
    rng: random.Random, width: int, height: int, color: str, *, held_out: bool
) -> Image.Image:
    """A background of one color, plain or with a faint pattern."""
    base = rgb(rng, color)
    kind = rng.choice(_HELD_OUT_BACKGROUNDS if held_out else _BACKGROUNDS)
    if kind == "plain":
        return Image.new("RGB", (width, height), base)
    noise = np.random.default_rng(rng.getrandbits(64))
    pattern = _pattern(kind, noise, width, height) * rng.uniform(5, 15)
    pixels = np.asarray(base, np.float32) + pattern[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _pattern(kind: str, noise: np.random.Generator, width: int, height: int) -> Pattern:
    """A pattern of (height, width), from about -1 to 1."""
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    period = noise.uniform(8, 30)
    if kind == "gradient":
        angle = noise.uniform(0, 2 * math.pi)
        return np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y
    if kind == "grain":
        return noise.standard_normal((height, width), np.float32) * np.float32(0.7)
    if kind in {"clouds", "bokeh"}:
        cells = noise.uniform(-1, 1, (noise.integers(2, 7), noise.integers(2, 7)))
        how = Image.Resampling.BICUBIC if kind == "clouds" else Image.Resampling.BOX
        small = Image.fromarray(cells.astype(np.float32))
        return np.asarray(small.resize((width, height), how))
    if kind == "stripes":
        along = x * width if noise.random() < 0.5 else y * height
        return np.broadcast_to(
            np.sign(np.sin(along * np.float32(math.pi / period))), (height, width)
        )
    if kind == "checks":
        columns, rows = (np.floor(axis / np.float32(period)) for axis in (x * width, y * height))
        checks: Pattern = (columns + rows) % 2 * 2 - 1
        return checks
    if kind == "waves":
        bent = y * height + np.sin(x * width / np.float32(period)) * np.float32(period / 3)
        waves: Pattern = np.sin(bent * np.float32(math.pi / period))
        return waves
    if kind == "speckles":
        return (noise.random((height, width), np.float32) < 0.02) * np.float32(2) - np.float32(0.5)
    if kind == "vignette":
        return np.float32(1) - np.hypot(x, y) * np.float32(1.2)
    across = np.sin(x * width * np.float32(math.pi / period))
    along = np.sin(y * height * np.float32(math.pi / period))
    if kind == "dots":
        dots: Pattern = np.sign(across * along - np.float32(0.5))
        return dots
    weave: Pattern = (across + along) * np.float32(0.5)
    return weave


def place(
    rng: random.Random, size: tuple[int, int], count: int, sides: tuple[float, float]
) -> list[Box]:
    """Square boxes that do not touch; their sides shrink if there is no room. May be fewer."""
    width, height = size
    smallest, largest = sides
    boxes: list[Box] = []
    for attempt in range(400):
        if len(boxes) == count:
            break
        side = rng.uniform(smallest, largest)
        x = rng.uniform(1, max(1.5, width - side - 2))
        y = rng.uniform(1, max(1.5, height - side - 2))
        gap = 4
        if all(
            x + side + gap < box[0]
            or box[2] + gap < x
            or y + side + gap < box[1]
            or box[3] + gap < y
            for box in boxes
        ):
            boxes.append((x, y, x + side, y + side))
        elif attempt % 20 == 19:
            smallest, largest = smallest * 0.85, largest * 0.85
    return boxes


def wear(rng: random.Random, image: Image.Image) -> Image.Image:
    """Degrades some pictures as transport does: slight blur, JPEG."""
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.25:
        with io.BytesIO() as file:
            image.save(file, "JPEG", quality=rng.randint(55, 95))
            image = Image.open(file).convert("RGB")
    return image
