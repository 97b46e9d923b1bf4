"""Sample pictures with questions and answers, for people who try the demo model.

The samples are fixed: pictures that the model understands, and one that it must say it does not.
They need only the base package, so their text is in the font inside Pillow.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from server.demo.drawing import Box, Lettering, Size, draw_shape, embedded_font, rgb
from server.demo.media import mp4, png
from server.demo.scenery import landscape
from server.demo.scoring import OUTSIDE

_WHAT = "What is in the image?"
_DESCRIBE = "Describe the image."
_HOW_MANY = "How many objects are there?"


@dataclass(frozen=True, slots=True)
class SampleQuestion:
    """A question about a sample's pictures; `task` says how its answer is scored."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """PNG or AVI files by name, in the order in which they are sent, and questions about them."""

    files: dict[str, bytes]
    questions: list[SampleQuestion]


@dataclass(frozen=True, slots=True)
class _Shape:
    color: str
    shape: str
    box: Box


def samples() -> list[Sample]:
    """All samples, the simplest first; the same at every call."""
    return [
        _circle(),
        _corner(),
        _three_shapes(),
        _stars(),
        _two_kinds(),
        _word(),
        _lines(),
        _receipt(),
        _chart(),
        _pair(),
        _outside(),
        _motion(),
    ]


def _circle() -> Sample:
    image = _drawn((224, 224), "white", _Shape("red", "circle", (46, 50, 166, 170)))
    return _sample(
        {"red-circle.png": png(image)},
        ("what", _WHAT, "a red circle"),
        ("caption", _DESCRIBE, "a red circle on a white background"),
        ("color", "What color is the object?", "red"),
        ("shape", "What shape is it?", "circle"),
        ("yes_no", "Is there a red circle?", "yes"),
        ("yes_no", "Is there a blue square?", "no"),
        ("box", "Give the bounding box of the red circle.", "[210, 220, 740, 760]"),
        ("json", "Give the color and shape as JSON.", '{"color": "red", "shape": "circle"}'),
    )


def _corner() -> Sample:
    image = _drawn((320, 240), "black", _Shape("yellow", "diamond", (18, 16, 92, 90)))
    return _sample(
        {"corner.png": png(image)},
        ("what", _WHAT, "a yellow diamond"),
        ("position", "Where is the yellow diamond?", "top left"),
        ("background", "What color is the background?", "black"),
        ("box", "Give the bounding box of the yellow diamond.", "[60, 70, 290, 380]"),
    )


def _three_shapes() -> Sample:
    image = _drawn(
        (448, 336),
        "white",
        _Shape("red", "square", (36, 196, 132, 292)),
        _Shape("green", "triangle", (176, 28, 276, 128)),
        _Shape("blue", "circle", (326, 150, 416, 240)),
    )
    caption = "a red square, a green triangle and a blue circle on a white background"
    return _sample(
        {"three-shapes.png": png(image)},
        ("caption", _DESCRIBE, caption),
        ("count", _HOW_MANY, "3"),
        ("color", "What color is the triangle?", "green"),
        ("shape", "What shape is the blue object?", "circle"),
        ("side", "Is the red square to the left or to the right of the blue circle?", "left"),
        ("side", "Is the red square above or below the green triangle?", "below"),
        ("yes_no", "Is there a green triangle?", "yes"),
        ("yes_no", "Is there a red star?", "no"),
        ("box", "Give the bounding box of the blue circle.", "[730, 450, 930, 710]"),
    )


def _stars() -> Sample:
    corners = ((30, 28), (142, 44), (254, 24), (64, 118), (196, 126), (28, 194), (262, 190))
    stars = [_Shape("yellow", "star", (x, y, x + 46, y + 46)) for x, y in corners]
    return _sample(
        {"seven-stars.png": png(_drawn((336, 264), "black", *stars))},
        ("count", _HOW_MANY, "7"),
        ("caption", _DESCRIBE, "seven yellow stars on a black background"),
        ("json", "Give the count and color as JSON.", '{"count": 7, "color": "yellow"}'),
    )


def _two_kinds() -> Sample:
    kinds = {
        ("blue", "square"): [(24, 26), (132, 140)],
        ("red", "circle"): [(140, 30), (236, 88), (34, 148)],
    }
    shapes = [
        _Shape(*kind, (x, y, x + 56, y + 56)) for kind, corners in kinds.items() for x, y in corners
    ]
    return _sample(
        {"squares-and-circles.png": png(_drawn((320, 224), "white", *shapes))},
        ("count", _HOW_MANY, "5"),
        ("count", "How many squares are there?", "2"),
        ("count", "How many circles are there?", "3"),
    )


def _word() -> Sample:
    return _sample(
        {"word.png": png(_written((320, 224), "blue", 84, ["HELLO"]))},
        ("read", "What does the text say?", "HELLO"),
        ("color", "What color is the text?", "blue"),
        ("json", "Give the text as JSON.", '{"text": "HELLO"}'),
    )


def _lines() -> Sample:
    lines = {"first": "STOP", "second": "2049", "third": "TAXI"}
    return _sample(
        {"three-lines.png": png(_written((320, 240), "black", 56, list(lines.values())))},
        *(("read_line", f"Read the {ordinal} line.", text) for ordinal, text in lines.items()),
    )


def _receipt() -> Sample:
    values = {"total": "18.50", "tax": "2.95", "table": "12"}
    texts = [f"{label.upper()}: {value}" for label, value in values.items()]
    return _sample(
        {"receipt.png": png(_written((400, 240), "black", 52, texts))},
        *(("read_label", f"What is the {label}?", value) for label, value in values.items()),
    )


def _chart() -> Sample:
    values = {"red": 35, "blue": 82, "green": 57}
    (width, height), margin, top, share = (320, 280), 22, 58, 0.7
    bottom, pitch = height - margin, (width - 2 * margin) / len(values)
    image = _drawn((width, height), "white")
    rng = random.Random(0)
    black = rgb(rng, "black")
    image.paste(black, (margin, bottom, width - margin, bottom + 2))
    for rank, (color, value) in enumerate(values.items()):
        left = margin + pitch * (rank + (1 - share) / 2)
        upper = bottom - (bottom - top) * value / 100
        bar = (round(left), round(upper), round(left + pitch * share), bottom)
        image.paste(rgb(rng, color), bar)
        number = Lettering.of(str(value), embedded_font(34))
        middle = left + pitch * share / 2
        number.draw(image, middle - number.width / 2, upper - number.height - 3, black)
    return _sample(
        {"bar-chart.png": png(image)},
        ("what", _WHAT, "a bar chart"),
        ("tallest", "Which bar is the tallest?", "blue"),
        ("shortest", "Which bar is the shortest?", "red"),
        ("bars", "How many bars are there?", "3"),
        *(
            ("value", f"What value is printed on the {color} bar?", str(value))
            for color, value in values.items()
        ),
    )


def _pair() -> Sample:
    size = 224, 224
    first = _Shape("red", "square", (60, 48, 164, 152))
    second = _Shape("blue", "square", (44, 72, 148, 176))
    files = {
        "pair-first.png": png(_drawn(size, "white", first)),
        "pair-second.png": png(_drawn(size, "white", second)),
    }
    return _sample(
        files,
        ("pair", "What is in the first image?", "a red square"),
        ("pair", "What is in the second image?", "a blue square"),
        ("pair", "Which image has a blue square?", "the second"),
        ("pair", "Do both images show the same color?", "no"),
        ("pair", "Do both images show the same shape?", "yes"),
    )


def _outside() -> Sample:
    pixels = landscape(np.random.default_rng(5), 288, 384)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return _sample(
        {"landscape.png": png(image)},
        ("outside", _WHAT, OUTSIDE),
        ("outside", _DESCRIBE, OUTSIDE),
    )


def _motion() -> Sample:
    circles = [_Shape("green", "circle", (x, 84, x + 60, 144)) for x in range(8, 160, 30)]
    return _sample(
        {"motion.mp4": mp4([_drawn((224, 224), "white", circle) for circle in circles])},
        ("motion", "In which direction does the circle move?", "right"),
        ("caption", _DESCRIBE, "a green circle that moves right on a white background"),
        ("color", "What color is the circle?", "green"),
    )


def _sample(files: dict[str, bytes], *questions: tuple[str, str, str]) -> Sample:
    """Questions are (task, text, answer)."""
    return Sample(files, [SampleQuestion(*question) for question in questions])


def _drawn(size: Size, background: str, *shapes: _Shape) -> Image.Image:
    rng = random.Random(0)
    image = Image.new("RGB", size, rgb(rng, background))
    for shape in shapes:
        draw_shape(rng, image, shape.shape, shape.color, shape.box)
    return image


def _written(size: Size, color: str, height: int, texts: list[str]) -> Image.Image:
    """Lines of text on white, one below the other; `height` in pixels per em."""
    image = _drawn(size, "white")
    ink = rgb(random.Random(0), color)
    lines = [Lettering.of(text, embedded_font(height)) for text in texts]
    left = (size[0] - max(line.width for line in lines)) / 2
    pitch = size[1] / len(lines)
    for number, line in enumerate(lines):
        line.draw(image, left, pitch * (number + 0.5) - line.height / 2, ink)
    return image
