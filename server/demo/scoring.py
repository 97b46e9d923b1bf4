"""Scores of answers, and the bars that the demo model's scores must reach."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

# The least score of a task, for those that have one.
BARS = {
    "color": 0.95,
    "shape": 0.95,
    "what": 0.95,
    "background": 0.95,
    "yes_no": 0.95,
    "side": 0.95,
    "tallest": 0.95,
    "position": 0.90,
    "caption": 0.90,
    "pair": 0.90,
    "count": 0.90,
    "json": 0.90,
    "outside": 0.90,
    "read": 0.85,
    "motion": 0.85,
    "box": 0.60,
}

_REFUSAL = "tiny demo model"
_MISS = 0.5  # below it an answer counts as wrong


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said. `size` is the class of its pictures, empty if it saw none."""

    task: str
    question: str
    expected: str
    got: str
    size: str = ""

    @property
    def score(self) -> float:
        """From 0 (wrong) to 1 (right)."""
        return score(self.task, self.expected, self.got)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers to the questions of one task; at least one."""

    task: str
    answers: list[Answer]

    @property
    def score(self) -> float:
        """The mean of the answers' scores."""
        return mean(self.answers)

    @property
    def bar(self) -> float | None:
        return BARS.get(self.task)

    @property
    def passed(self) -> bool:
        """Whether the score reaches the bar; also true if there is none."""
        return self.bar is None or self.score >= self.bar

    @property
    def misses(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.score < _MISS]

    def groups(self, key: Callable[[Answer], str]) -> dict[str, list[Answer]]:
        """The answers by what `key` says of them, in the order of it."""
        found: dict[str, list[Answer]] = {}
        for answer in sorted(self.answers, key=key):
            found.setdefault(key(answer), []).append(answer)
        return found


def mean(answers: list[Answer]) -> float:
    """The mean score of at least one answer."""
    return math.fsum(answer.score for answer in answers) / len(answers)


def score(task: str, expected: str, got: str) -> float:
    """How right an answer is, from 0 to 1.

    A box scores its intersection over union, JSON its equality as JSON, a picture outside the
    model's world that the model says so. All else must be the expected text.
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
    """JSON without the freedoms of its writing; None if it is none. 1, 1.0 and true differ."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


def _box(text: str) -> tuple[float, float, float, float] | None:
    """The box [x1, y1, x2, y2] that a text is; None if it is none or has no area."""
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
