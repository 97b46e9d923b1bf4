"""Boxes in a model's answer: found in its text, mapped to the original picture, drawn on it."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw

from saccade_client.media import opened

if TYPE_CHECKING:
    from saccade_client.answers import ShownImage
    from saccade_client.media import MediaSource

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
# [left, top, right, bottom], or Qwen-VL's (left, top),(right, bottom)
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_PAIRS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)")
_LABEL = re.compile(r'"label"\s*:\s*"([^"]*)"')
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


class Box(NamedTuple):
    """A rectangle, and what the model says is in it, if it does."""

    left: float
    top: float
    right: float
    bottom: float
    label: str | None = None


def find(text: str) -> list[Box]:
    """The boxes in `text`, in the model's coordinates, in the order of the text.

    It finds `[left, top, right, bottom]`, also in JSON, where a "label" of the same object becomes
    the label, and `(left, top),(right, bottom)`.
    """
    found = []
    for match in sorted(
        [*_LIST.finditer(text), *_PAIRS.finditer(text)], key=lambda match: match.start()
    ):
        left, top, right, bottom = map(float, match.groups())
        start = text.rfind("{", 0, match.start())
        end = text.find("}", match.end())
        label = _LABEL.search(text, start, end) if 0 <= start < end else None
        found.append(Box(left, top, right, bottom, label and label[1]))
    return found


def to_original(box: Box, shown: "ShownImage", scale: float | None = 1000) -> Box:
    """`box` in pixels of the original picture.

    `scale` is the range of the model's coordinates: 1000 for thousandths, 1 for fractions, None for
    pixels of the processed picture, as Qwen2.5-VL gives them. `shown` tells which region of the
    original the model saw, at which size.
    """
    left, top, right, bottom = shown.region
    across = (right - left) / (scale or shown.processed_width or shown.width)
    down = (bottom - top) / (scale or shown.processed_height or shown.height)
    return Box(
        left + box.left * across,
        top + box.top * down,
        left + box.right * across,
        top + box.bottom * down,
        box.label,
    )


def draw(source: "MediaSource", boxes: Iterable[Box]) -> Image.Image:
    """A copy of the picture with boxes, in its own pixels, drawn on it with their labels.

    Raises:
        UnusableMedia: the picture cannot be read here.
    """
    image = opened(source).convert("RGB")
    width = max(2, round(max(image.size) / 300))
    pen = ImageDraw.Draw(image)
    for index, box in enumerate(boxes):
        color = _COLORS[index % len(_COLORS)]
        corners = (
            *(min(box.left, box.right), min(box.top, box.bottom)),
            *(max(box.left, box.right), max(box.top, box.bottom)),
        )
        pen.rectangle(corners, outline=color, width=width)
        if box.label:
            at = (corners[0] + width, corners[1] + width)
            size = max(10, round(max(image.size) / 50))
            pen.rectangle(pen.textbbox(at, box.label, font_size=size), fill="white")
            pen.text(at, box.label, fill=color, font_size=size)
    return image
