"""Drawing of colored shapes and of text, for the samples and for the training.

Coordinates are pixels, x to the right and y downwards; boxes are (left, top, right, bottom).
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]
Size = tuple[int, int]  # width and height in pixels

# A color is a random mixture of two of its values, plus a little noise.
COLORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((220, 30, 30), (255, 0, 0), (200, 20, 40), (230, 40, 20)),
    "green": ((30, 160, 50), (0, 128, 0), (40, 180, 40), (0, 200, 0), (20, 120, 50)),
    "blue": ((35, 70, 220), (0, 0, 255), (20, 60, 180), (50, 90, 230)),
    "yellow": ((240, 220, 30), (255, 255, 0), (250, 210, 20)),
    "orange": ((245, 140, 20), (255, 128, 0), (255, 150, 30)),
    "purple": ((130, 40, 170), (128, 0, 128), (110, 40, 180), (150, 50, 190)),
    "pink": ((250, 130, 185), (255, 105, 180), (255, 160, 200)),
    "black": ((15, 15, 15), (0, 0, 0), (30, 30, 32)),
    "white": ((250, 250, 250), (255, 255, 255), (240, 240, 238)),
    "gray": ((128, 128, 128), (110, 112, 115), (150, 150, 150)),
    "brown": ((120, 70, 30), (139, 69, 19), (100, 60, 30)),
    "cyan": ((40, 210, 220), (0, 255, 255), (0, 190, 210)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

_SUPERSAMPLING = 3
_JITTER = 9


def rgb(rng: random.Random, color: str) -> Rgb:
    """A random RGB value of a named color."""
    one, other = rng.choice(COLORS[color]), rng.choice(COLORS[color])
    share = rng.random()
    red, green, blue = (
        min(255, max(0, round(a + (b - a) * share) + rng.randint(-_JITTER, _JITTER)))
        for a, b in zip(one, other, strict=True)
    )
    return red, green, blue


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the square from (-1, -1) to (1, 1)."""
    if shape == "circle":
        return [(math.cos(t * math.pi / 36), math.sin(t * math.pi / 36)) for t in range(72)]
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    if shape == "star":
        points = []
        for corner in range(10):
            radius = 1.0 if corner % 2 == 0 else 0.42
            angle = -math.pi / 2 + corner * math.pi / 5
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        return points
    arm = 0.34  # half the width of a cross's arms
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


_OUTLINES = {shape: _outline(shape) for shape in SHAPES}


def draw_shape(rng: random.Random, image: Image.Image, shape: str, color: str, box: Box) -> None:
    """Draws a shape with smooth edges into its box."""
    left, top = math.floor(box[0]), math.floor(box[1])
    width, height = math.ceil(box[2]) - left, math.ceil(box[3]) - top
    mask = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    center = ((box[0] + box[2]) / 2 - left, (box[1] + box[3]) / 2 - top)
    radii = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    points = [
        (
            (center[0] + x * radii[0]) * _SUPERSAMPLING,
            (center[1] + y * radii[1]) * _SUPERSAMPLING,
        )
        for x, y in _OUTLINES[shape]
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(rgb(rng, color), (left, top), mask.reduce(_SUPERSAMPLING))


def embedded_font(size: int) -> ImageFont.FreeTypeFont:
    """The font inside Pillow (Aileron) at `size` pixels per em."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    # The basic layout is the same wherever Pillow runs; Raqm is an optional part of it.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True, slots=True)
class Lettering:
    """A text that can be drawn; `ink` is its box relative to the drawing point."""

    text: str
    font: ImageFont.FreeTypeFont
    stroke: int
    ink: Box

    @property
    def width(self) -> float:
        """Of the ink, in pixels."""
        return self.ink[2] - self.ink[0]

    @property
    def height(self) -> float:
        """Of the ink, in pixels."""
        return self.ink[3] - self.ink[1]

    @classmethod
    def of(cls, text: str, font: ImageFont.FreeTypeFont, stroke: int = 0) -> "Lettering":
        """Measures a text; `stroke` is the width of its outline in pixels."""
        return cls(text, font, stroke, font.getbbox(text, stroke_width=stroke))

    def draw(self, image: Image.Image, x: float, y: float, color: Rgb) -> Box:
        """Draws the text with the top left corner of its ink at (x, y); returns the ink's box."""
        start = (x - self.ink[0], y - self.ink[1])
        ImageDraw.Draw(image).text(
            start, self.text, fill=color, font=self.font, stroke_width=self.stroke
        )
        return x, y, x + self.width, y + self.height
