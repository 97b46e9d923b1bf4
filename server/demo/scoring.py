"""How right an answer of the demo model is."""

import json
import math
from dataclasses import dataclass

OUTSIDE = (
    "I am only a tiny demo model: I know drawn shapes, short texts and bar charts, not pictures "
    "like this one."
)
"""The answer to a picture that the model was not made for."""
_REFUSAL = "tiny demo model"  # in every answer that counts as such a refusal


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a question. `size` is the class of its pictures, empty without any."""

    task: str
    question: str
    expected: str
    got: str
    size: str = ""

    @property
    def score(self) -> float:
        """From 0 (wrong) to 1 (right)."""
        return score(self.task, self.expected, self.got)


def score(task: str, expected: str, got: str) -> float:
    """The score of an answer, from 0 to 1.

    A box scores its intersection over union, JSON its equality as JSON, and a picture that the
    model was not made for scores if the answer says so. Everything else must be the expected text.
    """
    got = got.strip()
    if task == "box":
        return _overlap(_box(expected), _box(got))
    if task == "json":
        return float(_canonical(got) == _canonical(expected))
    if task == "outside":
        return float(_REFUSAL in got)
    return float(got == expected)


def _canonical(text: str) -> str | None:
    """JSON with sorted keys and uniform spacing; None if invalid. 1, 1.0 and true differ."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


def _box(text: str) -> tuple[float, float, float, float] | None:
    """Parses [x1, y1, x2, y2]; None if the text is something else or the box has no area."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        return None
    if len(values) != 4 or not all(map(math.isfinite, values)):
        return None
    left, top, right, bottom = values
    return (left, top, right, bottom) if left < right and top < bottom else None


def _overlap(
    one: tuple[float, float, float, float] | None, other: tuple[float, float, float, float] | None
) -> float:
    """Intersection over union of two boxes; 0 if one is missing."""
    if one is None or other is None:
        return 0.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)
