"""Sample pictures with questions and answers, for those who try the demo model.

They are fixed: pictures of the model's world and one from outside it. Unlike training and the
evaluation they need only the base package, and so the font inside Pillow.
"""

import io
import json
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from server.demo import words
from server.demo.asking import avi
from server.demo.fonts import Face
from server.demo.objects import Item
from server.demo.phrases import WORDINGS
from server.demo.pictures import Lettering, draw_shape, rgb
from server.demo.scene import Question, Size, thousandths
from server.demo.scenery import landscape

_FONT = Face("Aileron", None)


@dataclass(frozen=True, slots=True)
class Sample:
    """PNG or AVI files by name, in the order they are sent, and questions about them."""

    files: dict[str, bytes]
    questions: list[Question]


def samples() -> list[Sample]:
    """All samples, the simplest first; always the same."""
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
    size = 224, 224
    item = Item("red", "circle", (46, 50, 166, 170))
    questions = [
        _question("what", "a red circle"),
        _question("caption", "a red circle on a white background"),
        _question("color_only", "red", task="color"),
        _question("shape_only", "circle", task="shape"),
        _question("yes_no", "yes", object="red circle"),
        _question("yes_no", "no", object="blue square"),
        _box(item, size),
        _question("json", '{"color": "red", "shape": "circle"}', keys="color and shape"),
    ]
    return Sample({"red-circle.png": _png(_drawn(size, "white", item))}, questions)


def _corner() -> Sample:
    size = 320, 240
    item = Item("yellow", "diamond", (18, 16, 92, 90))
    questions = [
        _question("what", "a yellow diamond"),
        _question("position", "top left", object="yellow diamond"),
        _question("background", "black"),
        _box(item, size),
    ]
    return Sample({"corner.png": _png(_drawn(size, "black", item))}, questions)


def _three_shapes() -> Sample:
    size = 448, 336
    square = Item("red", "square", (36, 196, 132, 292))
    triangle = Item("green", "triangle", (176, 28, 276, 128))
    circle = Item("blue", "circle", (326, 150, 416, 240))
    image = _drawn(size, "white", square, triangle, circle)
    pair = {"object": "red square", "other": "blue circle"}
    labels = words.enumeration([square.label, triangle.label, circle.label])
    questions = [
        _question("caption", f"{labels} on a white background"),
        _question("count", "3"),
        _question("color", "green", shape="triangle"),
        _question("shape", "circle", color="blue"),
        _question("side", "left", **pair),
        _question("height", "below", task="side", **pair | {"other": "green triangle"}),
        _question("yes_no", "yes", object="green triangle"),
        _question("yes_no", "no", object="red star"),
        _box(circle, size),
    ]
    return Sample({"three-shapes.png": _png(image)}, questions)


def _stars() -> Sample:
    corners = ((30, 28), (142, 44), (254, 24), (64, 118), (196, 126), (28, 194), (262, 190))
    items = [Item("yellow", "star", (x, y, x + 46, y + 46)) for x, y in corners]
    questions = [
        _question("count", "7"),
        _question("caption", "seven yellow stars on a black background"),
        _question("json", '{"count": 7, "color": "yellow"}', keys="count and color"),
    ]
    return Sample({"seven-stars.png": _png(_drawn((336, 264), "black", *items))}, questions)


def _two_kinds() -> Sample:
    squares = [Item("blue", "square", (x, y, x + 56, y + 56)) for x, y in ((24, 26), (132, 140))]
    circles = [
        Item("red", "circle", (x, y, x + 56, y + 56)) for x, y in ((140, 30), (236, 88), (34, 148))
    ]
    questions = [
        _question("count", "5"),
        _question("count_kind", "2", task="count", shapes="squares"),
        _question("count_kind", "3", task="count", shapes="circles"),
    ]
    image = _drawn((320, 224), "white", *squares, *circles)
    return Sample({"squares-and-circles.png": _png(image)}, questions)


def _word() -> Sample:
    image = _written((320, 224), "blue", 84, ["HELLO"])
    questions = [
        _question("read", "HELLO"),
        _question("color", "blue", shape="text"),
        _question("json", '{"text": "HELLO"}', keys="text"),
    ]
    return Sample({"word.png": _png(image)}, questions)


def _lines() -> Sample:
    texts = ["STOP", "2049", "TAXI"]
    questions = [
        _question("read_line", text, line=ordinal)
        for text, ordinal in zip(texts, words.ORDINALS, strict=False)
    ]
    return Sample({"three-lines.png": _png(_written((320, 240), "black", 56, texts))}, questions)


def _receipt() -> Sample:
    values = {"total": "18.50", "tax": "2.95", "table": "12"}
    texts = [f"{label.upper()}: {value}" for label, value in values.items()]
    questions = [_question("read_label", value, label=label) for label, value in values.items()]
    return Sample({"receipt.png": _png(_written((400, 240), "black", 52, texts))}, questions)


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
        image.paste(
            rgb(rng, color), (round(left), round(upper), round(left + pitch * share), bottom)
        )
        shown = Lettering.of(str(value), _FONT.load(34))
        middle = left + pitch * share / 2
        shown.draw(image, middle - shown.width / 2, upper - shown.height - 3, black)
    questions = [
        _question("what", "a bar chart"),
        _question("tallest", "blue"),
        _question("shortest", "red"),
        _question("bars", "3"),
        *(_question("value", str(value), color=color) for color, value in values.items()),
    ]
    return Sample({"bar-chart.png": _png(image)}, questions)


def _pair() -> Sample:
    size = 224, 224
    first = Item("red", "square", (60, 48, 164, 152))
    second = Item("blue", "square", (44, 72, 148, 176))
    files = {
        "pair-first.png": _png(_drawn(size, "white", first)),
        "pair-second.png": _png(_drawn(size, "white", second)),
    }
    questions = [
        _question("nth_what", "a red square", task="pair", ordinal="first"),
        _question("nth_what", "a blue square", task="pair", ordinal="second"),
        _question("which", "the second", task="pair", object="blue square"),
        _question("same", "no", task="pair", aspect="color"),
        _question("same", "yes", task="pair", aspect="shape"),
    ]
    return Sample(files, questions)


def _outside() -> Sample:
    pixels = landscape(np.random.default_rng(5), 288, 384)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    questions = [
        _question("what", words.OUTSIDE, task="outside"),
        _question("caption", words.OUTSIDE, task="outside"),
    ]
    return Sample({"landscape.png": _png(image)}, questions)


def _motion() -> Sample:
    items = [Item("green", "circle", (x, 84, x + 60, 144)) for x in range(8, 160, 30)]
    frames = [_drawn((224, 224), "white", item) for item in items]
    questions = [
        _question("motion", "right", shape="circle"),
        _question("caption", "a green circle that moves right on a white background"),
        _question("color", "green", shape="circle"),
    ]
    return Sample({"motion.avi": avi(frames)}, questions)


def _question(wordings: str, answer: str, /, *, task: str = "", **slots: str) -> Question:
    """A question in its first wording; how it is scored is of the same name unless told."""
    text = WORDINGS[wordings].training[0].format(**slots)
    return Question(task or wordings, text, answer)


def _box(item: Item, size: Size) -> Question:
    return _question("box", json.dumps(thousandths(item.box, size)), object=item.name)


def _drawn(size: Size, behind: str, *items: Item) -> Image.Image:
    rng = random.Random(0)
    image = Image.new("RGB", size, rgb(rng, behind))
    for item in items:
        draw_shape(rng, image, item.shape, item.color, item.box)
    return image


def _written(size: Size, color: str, height: int, texts: list[str]) -> Image.Image:
    """Lines of text on white, one below the other; `height` in pixels per em."""
    image = _drawn(size, "white")
    ink = rgb(random.Random(0), color)
    lines = [Lettering.of(text, _FONT.load(height)) for text in texts]
    left = (size[0] - max(line.width for line in lines)) / 2
    pitch = size[1] / len(lines)
    for number, line in enumerate(lines):
        line.draw(image, left, pitch * (number + 0.5) - line.height / 2, ink)
    return image


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()
