"""Pictures that the demo model is certain of, with the expected answers.

They were chosen by measurement: each token of each answer is nearly certain.
"""

import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFont

from server.demo.drawing import COLORS, Lettering, draw_shape
from server.demo.training.words import ORDINALS, article
from server.imaging.sizing import Size
from tests import encoded, pictures, profiles

WHAT = "What is in the image?"
READ = "What does the text say?"

# color, shape, background
SHAPES = [
    *itertools.product(
        ("red", "green", "blue", "purple", "black", "brown", "orange"),
        ("circle", "square", "triangle", "star", "diamond", "cross"),
        ("white",),
    ),
    *itertools.product(
        ("yellow", "pink"),
        ("circle", "square", "triangle", "star"),
        ("black",),
    ),
]
SEVERAL = [
    ("red", "circle", "white"),
    ("blue", "square", "white"),
    ("green", "triangle", "white"),
    ("black", "star", "white"),
]
NAMED = ["red", "green", "blue", "yellow"]  # the colors that every file format must preserve
UPRIGHT = "PAPER"
SMALL = "PAPER"
SMALL_GLYPH = 24  # pixels, in a picture of 640 x 480
CAP = 12  # tokens: the small text is 5 pixels high


@dataclass(frozen=True)
class Asked:
    """A message and its expected answer."""

    content: list[dict[str, Any]]
    answer: str


def drawn(color: str, shape: str, behind: str, size: Size = (224, 224)) -> Image.Image:
    """One large shape in the middle of a plain picture."""
    image = Image.new("RGB", size, COLORS[behind][0])
    width, height = size
    half = min(size) * 0.3
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    draw_shape(random.Random(f"{color} {shape}"), image, shape, color, box)
    return image


def written(text: str, size: Size, glyph: float) -> Image.Image:
    """A text in the middle of a white picture; `glyph` is about its height in pixels."""
    image = Image.new("RGB", size, "white")
    font = ImageFont.load_default(round(glyph * 1.4))
    assert isinstance(font, ImageFont.FreeTypeFont)
    line = Lettering.of(text, font)
    line.draw(image, (size[0] - line.width) / 2, (size[1] - line.height) / 2, (0, 0, 0))
    return image


def asked(*files: bytes, question: str, answer: str, **options: Any) -> Asked:
    """A question about images; `options` are added beside each image's URL."""
    parts = [pictures.image_part(file) for file in files]
    for part in parts:
        part["image_url"].update(options)
    return Asked([*parts, pictures.text_part(question)], answer)


def fifty() -> list[Asked]:
    """Different pictures of one size, and one question for all of them."""
    return [
        asked(pictures.encode(drawn(*shape)), question=WHAT, answer=article(" ".join(shape[:2])))
        for shape in SHAPES
    ]


def orders(count: int) -> Iterator[Asked]:
    """The first `count` pictures of SEVERAL in every order, with a question about one of them."""
    files = {shape: pictures.encode(drawn(*shape)) for shape in SEVERAL[:count]}
    for turn, order in enumerate(itertools.permutations(files)):
        place = turn % count
        yield asked(
            *(files[shape] for shape in order),
            question=f"What is in the {ORDINALS[place]} image?",
            answer=article(" ".join(order[place][:2])),
        )


def turned(orientation: int, *, tagged: bool = True) -> Asked:
    """A text that is upright if EXIF's orientation is applied; without it if not `tagged`."""
    upright = np.asarray(written(UPRIGHT, (256, 224), 40))
    stored = Image.fromarray(np.ascontiguousarray(pictures.STORED_AS[orientation](upright)))
    file = encoded.turned(stored, "PNG", orientation) if tagged else pictures.encode(stored)
    return asked(file, question=READ, answer=UPRIGHT)


def kinds(color: str) -> dict[str, Asked]:
    """One picture in every file format. Each shows a wrong color if it is decoded as plain RGB."""
    shape = (color, "square", "black" if color == "yellow" else "white")
    image = drawn(*shape)
    deep = np.asarray(image)[:, :, ::-1].astype(np.uint16) * 257
    red, green, blue = profiles.SRGB
    rotated = profiles.rgb((blue, red, green), profiles.srgb_curve())
    channels = image.split()
    stored = Image.merge("RGB", [channels[2], channels[0], channels[1]])
    files = {
        "cmyk jpeg": pictures.encode(image.convert("CMYK"), "JPEG", quality=95),
        "cmyk tiff": pictures.encode(image.convert("CMYK"), "TIFF"),
        "16 bits": cv2.imencode(".png", deep)[1].tobytes(),
        "palette": pictures.encode(image.quantize(16)),
        "gif": pictures.encode(image, "GIF"),
        "profile": pictures.encode(stored, icc_profile=rotated),
    }
    answer = article(f"{color} square")
    return {kind: asked(file, question=WHAT, answer=answer) for kind, file in files.items()}


def deep_grey() -> Asked:
    """16-bit black on white: white on white if samples are clipped to 8 bits."""
    grey = np.asarray(drawn("black", "circle", "white").convert("L")).astype(np.uint16) * 257
    file = cv2.imencode(".png", grey)[1].tobytes()
    return asked(file, question=WHAT, answer="a black circle")


def small_text(**options: Any) -> Asked:
    with io.BytesIO() as file:
        written(SMALL, (640, 480), SMALL_GLYPH).save(file, "PNG")
        return asked(file.getvalue(), question=READ, answer=SMALL, **options)


def unreadable_text() -> bytes:
    """A PNG file with text of 4 pixels height, which the model can only guess."""
    return pictures.encode(written(SMALL, (224, 224), 4))
