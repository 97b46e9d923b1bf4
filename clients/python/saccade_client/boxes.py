"""Boxes and points in a model's answer: found in its text, mapped to the original picture, drawn on
it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw

from saccade_client import grounding
from saccade_client.media import opened

if TYPE_CHECKING:
    from saccade_client.answers import ShownImage
    from saccade_client.media import MediaSource

_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


class Box(NamedTuple):
    """A rectangle, and what the model says is in it, if it does.

    `scale` is the range of the coordinates, if the answer's notation tells it; None also in pixels.
    """

    left: float
    top: float
    right: float
    bottom: float
    label: str | None = None
    scale: float | None = None


class Point(NamedTuple):
    """A point, and what the model says is there, if it does. `scale` is as in `Box`."""

    x: float
    y: float
    label: str | None = None
    scale: float | None = None


def find(text: str) -> list[Box]:
    """The boxes in `text`, in the model's coordinates, in the order of the text. The notations are
    those of `grounding`."""
    return [
        Box(*place.numbers, place.label, place.scale)
        for place in grounding.find(text)
        if len(place.numbers) == 4
    ]


def find_points(text: str) -> list[Point]:
    """As `find`, for points."""
    return [
        Point(*place.numbers, place.label, place.scale)
        for place in grounding.find(text)
        if len(place.numbers) == 2
    ]


def to_original(box: Box, shown: "ShownImage", scale: float | None = 1000) -> Box:
    """`box` in pixels of the original picture.

    `scale` is the range of the model's coordinates, unless the box has its own: 1000 for
    thousandths, 1 for fractions, None for pixels of the processed picture, as Qwen2.5-VL gives
    them. `shown` tells which region of the original the model saw, at which size.
    """
    left, top, right, bottom = _mapped(box[:4], shown, box.scale or scale)
    return Box(left, top, right, bottom, box.label)


def point_to_original(point: Point, shown: "ShownImage", scale: float | None = 1000) -> Point:
    """As `to_original`, for a point."""
    x, y = _mapped(point[:2], shown, point.scale or scale)
    return Point(x, y, point.label)


def _mapped(
    numbers: tuple[float, ...], shown: "ShownImage", scale: float | None
) -> tuple[float, ...]:
    size = shown.processed_width or shown.width, shown.processed_height or shown.height
    return grounding.mapped(numbers, shown.region, size, scale)


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
