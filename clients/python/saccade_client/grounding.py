"""Boxes and points in a model's answer, in the notations of the model families.

Each family writes places its own way: as numbers in brackets, as JSON, or as tokens that stand for
places. Such tokens are in a text only if the request has `"skip_special_tokens": false`.
`clients/grounding.json` has examples, which both clients are tested with.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

MOST_PLACES = 10_000
"""Of a text; later places are left out."""

_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = ",".join([rf"\s*{_NUMBER}\s*"] * 4)
_TWO = ",".join([rf"\s*{_NUMBER}\s*"] * 2)
_PAIR = rf"\({_TWO}\)"
_KEYED_LABEL = re.compile(r'"(?:label|name|text_content)"\s*:\s*"([^"]*)"')
# How far from a place its label may be, in characters.
_NEAR = 500
_TAGGED_LABEL = rf"(?P<label>[^<]{{0,{_NEAR}}})"


@dataclass(frozen=True)
class Place:
    """A box or a point that a model has written.

    Attributes:
        numbers: (left, top, right, bottom) of a box, or (x, y) of a point.
        label: what the model says is there, if it does.
        scale: the range of the numbers, if the notation tells: 1000 for thousandths of the picture.
            None: it depends on the model.
    """

    numbers: tuple[float, ...]
    label: str | None = None
    scale: float | None = None


_Read: TypeAlias = Callable[[re.Match[str]], Iterator[Place]]


def find(text: str) -> list[Place]:
    """The boxes and points in `text`, in its order."""
    places: list[tuple[int, Place]] = []
    for notation, read in _NOTATIONS:
        for match in notation.finditer(text):
            places += [(match.start(), place) for place in read(match)]
            if len(places) > MOST_PLACES:
                break
        # What one notation explains is not read again by the next.
        text = notation.sub(lambda match: " " * len(match[0]), text)
    return [place for _, place in sorted(places, key=lambda each: each[0])][:MOST_PLACES]


def mapped(
    numbers: Sequence[float],
    region: Sequence[float],
    size: tuple[float, float],
    scale: float | None,
) -> tuple[float, ...]:
    """`numbers` (x, y, ...) of a place in pixels of the original picture.

    `scale` is their range; None: they are pixels of the processed picture, whose `size` is (width,
    height). It shows `region` of the original: (left, top, right, bottom).
    """
    left, top, right, bottom = region
    across, down = (right - left) / (scale or size[0]), (bottom - top) / (scale or size[1])
    starts_and_steps = ((left, across), (top, down))
    return tuple(
        starts_and_steps[index % 2][0] + number * starts_and_steps[index % 2][1]
        for index, number in enumerate(numbers)
    )


def _tagged(scale: float | None) -> _Read:
    """Numbers between tags, behind a label between tags."""

    def read(match: re.Match[str]) -> Iterator[Place]:
        return _grouped(match["places"], match["label"], scale)

    return read


def _grouped(written: str, label: str | None, scale: float | None) -> Iterator[Place]:
    """Numbers in fours are boxes; two are a point."""
    numbers = [float(number) for number in re.findall(_NUMBER, written)]
    size = 2 if len(numbers) == 2 else 4
    for at in range(0, len(numbers) - size + 1, size):
        yield Place(tuple(numbers[at : at + size]), _stripped(label), scale)


def _stripped(label: str | None) -> str | None:
    return (label or "").strip() or None


def _patches(match: re.Match[str]) -> Iterator[Place]:
    """Kosmos-2: two cells, in a grid of 32 by 32 (`patch_index_to_coordinate` in transformers)."""
    cells = [int(cell) for cell in re.findall(r"\d+", match["places"])]
    for first, last in zip(cells[::2], cells[1::2], strict=False):
        (top, left), (bottom, right) = divmod(first, 32), divmod(last, 32)
        if left == right or top == bottom:
            corners = left, top, right + 1, bottom + 1
        else:  # from the middle of the one to that of the other
            corners = left + 0.5, top + 0.5, right + 0.5, bottom + 0.5  # type: ignore[assignment]
        yield Place(tuple(map(float, corners)), _stripped(match["label"]), 32)


def _points(match: re.Match[str]) -> Iterator[Place]:
    """Molmo: `<point x="10.5" y="20" alt="a">`, `<points x1="1" y1="2" x2="3" y2="4" ...>`, in
    hundredths."""
    fields = dict(re.findall(r'\b([xy]\d*|alt)="([^"]*)"', match["fields"]))
    label = _stripped(match["label"]) or fields.get("alt")
    for name, x in fields.items():
        y = fields.get(f"y{name[1:]}", "")
        if name[0] == "x" and re.fullmatch(_NUMBER, x) and re.fullmatch(_NUMBER, y):
            yield Place((float(x), float(y)), label, 100)


def _places_before(match: re.Match[str]) -> Iterator[Place]:
    """PaliGemma: top, left, bottom, right, in 1024ths, before their label."""
    top, left, bottom, right = map(float, re.findall(r"\d{4}", match["places"]))
    yield Place((left, top, right, bottom), _stripped(match["label"]), 1024)


def _places_behind(match: re.Match[str]) -> Iterator[Place]:
    """Florence-2: the numbers of thousandths, whose middles are meant (its processor's
    `dequantize`), behind their label."""
    before = match.string[max(0, match.start() - _NEAR) : match.start()]
    label = re.split(r"[<>\n;]", before)[-1]
    for place in _grouped(match[0], label, 1000):
        yield Place(tuple(number + 0.5 for number in place.numbers), place.label, 1000)


def _keyed(match: re.Match[str]) -> Iterator[Place]:
    """JSON. Gemini's and Gemma's `box_2d` is top, left, bottom, right, in thousandths."""
    label = _label_around(match)
    for place in _grouped(match["places"], label, None):
        if match["key"] == "box_2d" and len(place.numbers) == 4:
            top, left, bottom, right = place.numbers
            yield Place((left, top, right, bottom), label, 1000)
        else:
            yield place


def _label_around(match: re.Match[str]) -> str | None:
    """The label in the JSON object with the match."""
    start = match.string.rfind("{", max(0, match.start() - _NEAR), match.start())
    end = match.string.find("}", match.end(), match.end() + _NEAR)
    found = _KEYED_LABEL.search(match.string, start, end) if 0 <= start < end else None
    return _stripped(found[1]) if found else None


def _bare(match: re.Match[str]) -> Iterator[Place]:
    return _grouped(match[0], _label_around(match), None)


_BODY = r"(?P<places>[-\d\s.,()\[\]]+)"
_NOTATIONS: list[tuple[re.Pattern[str], _Read]] = [
    # DeepSeek-VL2
    (
        re.compile(
            rf"(?:<\|ref\|>{_TAGGED_LABEL}<\|/ref\|>\s*)?<\|det\|>{_BODY}<\|/det\|>",
        ),
        _tagged(999),
    ),
    # InternVL, MiniCPM-V
    (re.compile(rf"(?:<ref>{_TAGGED_LABEL}</ref>\s*)?<box>{_BODY}</box>"), _tagged(1000)),
    # Qwen2-VL
    (
        re.compile(
            rf"(?:<\|object_ref_start\|>{_TAGGED_LABEL}<\|object_ref_end\|>\s*)?"
            rf"<\|box_start\|>{_BODY}<\|box_end\|>"
        ),
        _tagged(1000),
    ),
    # GLM-4.1V and later
    (
        re.compile(rf"(?P<label>)<\|begin_of_box\|>(?=[\s\[]){_BODY}<\|end_of_box\|>"),
        _tagged(1000),
    ),
    # Kosmos-2
    (
        re.compile(
            rf"(?:<phrase>{_TAGGED_LABEL}</phrase>)?<object>"
            r"(?P<places>(?:<patch_index_\d{4}>|</delimiter_of_multi_objects/>)+)</object>"
        ),
        _patches,
    ),
    # Molmo
    (
        re.compile(
            rf"<points?\s(?P<fields>[^<>]+)>(?:{_TAGGED_LABEL}</points?>)?",
        ),
        _points,
    ),
    # PaliGemma
    (re.compile(r"(?P<places>(?:<loc\d{4}>){4})(?P<label>[^<;\n]{0,200})"), _places_before),
    # Florence-2
    (re.compile(r"(?:<loc_\d{1,3}>){2,}"), _places_behind),
    # JSON: Qwen2.5-VL and later, GLM-4.5V, Gemma 3
    (
        re.compile(
            r'"(?P<key>bbox_2d|bbox|box_2d|box|point_2d|point)"\s*:\s*'
            rf"(?P<places>\[(?:{_FOUR}|{_TWO})\])"
        ),
        _keyed,
    ),
    # Any: [left, top, right, bottom], or (left, top),(right, bottom)
    (re.compile(rf"\[{_FOUR}\]|{_PAIR}\s*(?:,\s*)?{_PAIR}"), _bare),
]
