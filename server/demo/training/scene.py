"""Parts of all scenes: questions, positions and their names, backgrounds."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from server.demo.drawing import Box, Size
from server.demo.training import words
from server.demo.training.phrases import wording
from server.demo.training.pictures import Glyph, Picture, background, background_color

MARGIN = 0.05  # share of the picture; positions closer to where their name changes get no name
ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True, slots=True)
class Mention:
    """A name in a question, and the facts of what it names."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Spelling:
    """A text in an answer, and the facts to predict before each of its characters."""

    text: str
    facts: tuple[Mapping[str, str], ...]

    @classmethod
    def of(cls, text: str, glyphs: list[Glyph], size: Size) -> "Spelling":
        """A text without spaces; facts are the next two characters and the first one's edges."""
        facts = []
        for index, glyph in enumerate(glyphs):
            left, right = glyph.x - glyph.width / 2, glyph.x + glyph.width / 2
            x0, _, x1, _ = map(str, thousandths((left, glyph.y, right, glyph.y), size))
            following = dict(zip(("char", "next"), text[index:], strict=False))
            facts.append({**following, "x0": x0, "x1": x1})
        return cls(text, tuple(facts))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture. `task` is its name in the evaluation."""

    task: str
    text: str
    answer: str
    weight: float = 1.0
    mentions: tuple[Mention, ...] = ()
    spelling: Spelling | None = None


@dataclass(slots=True)
class Scene:
    """A picture and questions about it. `label` describes it, such as "a red circle"."""

    picture: Picture
    questions: list[Question]
    label: str
    color: str = ""
    shape: str = ""
    spelling: Spelling | None = None


class Asker:
    """Collects questions in varied wordings."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.questions: list[Question] = []

    def __call__(
        self,
        task: str,
        wordings: str,
        answer: str,
        weight: float = 1.0,
        spelling: Spelling | None = None,
        /,
        **slots: str | Mention,
    ) -> None:
        names = {
            slot: value.name if isinstance(value, Mention) else value
            for slot, value in slots.items()
        }
        text = wording(self.rng, wordings, held_out=self.held_out, **names)
        mentions = tuple(value for value in slots.values() if isinstance(value, Mention))
        self.questions.append(Question(task, text, answer, weight, mentions, spelling))


def thousandths(box: Box, size: Size) -> list[int]:
    """A box in thousandths of the picture, to the nearest ten."""
    shares = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    return [min(1000, max(0, round(share * 100) * 10)) for share in shares]


def cell(center: tuple[float, float], size: Size) -> tuple[str, str] | None:
    """Row and column in a grid of 3 by 3; None if the point is near another cell."""
    shares = center[0] / size[0], center[1] / size[1]
    if any(abs(share - edge) < MARGIN for share in shares for edge in (1 / 3, 2 / 3)):
        return None
    return ROWS[int(shares[1] * 3)], COLUMNS[int(shares[0] * 3)]


def position(row: str, column: str) -> str:
    """The name of a position: "top left", "left", "center"."""
    if row == "center":
        return column
    return row if column == "center" else f"{row} {column}"


def place_facts(box: Box, size: Size) -> dict[str, str]:
    center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    facts = dict(zip(("x0", "y0", "x1", "y1"), map(str, thousandths(box, size)), strict=True))
    if found := cell(center, size):
        facts["row"], facts["column"] = found
    return facts


def blank(rng: random.Random, size: Size, kind: str, held_out: bool) -> tuple[Picture, str]:
    color = background_color(rng)
    image = background(rng, *size, color, held_out=held_out)
    return Picture([image], {"kind": kind, "background": color}), color


def caption(labels: list[str], behind: str) -> str:
    return f"{words.enumeration(labels)} on {words.article(behind)} background"
