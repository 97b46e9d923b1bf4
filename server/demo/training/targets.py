"""Targets of the auxiliary losses: the facts that each token must predict."""

from collections.abc import Mapping
from functools import cache

import numpy as np

from server.demo.drawing import COLORS, SHAPES
from server.demo.training import vocabulary, words
from server.demo.training.pictures import Picture

Grid = tuple[int, int]  # rows and columns of tokens
# The facts, and the words for each.
FACTS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": (*SHAPES, "text", "bar"),
    "char": tuple(words.CHARACTERS),
    "next": tuple(words.CHARACTERS),
    "index": tuple("12345678"),
    "line": words.ORDINALS,
    "owner": (*words.LABELS, *COLORS),
    "background": tuple(COLORS),
    "kind": ("shapes", "text", "chart", "note", "photo"),
    "count": tuple("123456789"),
    "rank": tuple("123456789"),
    "row_count": tuple("123456789"),
    "column_count": tuple("123456789"),
    "row": ("top", "center", "bottom"),
    "column": ("left", "center", "right"),
    "extreme": ("tallest", "shortest"),
    "motion": tuple(words.DIRECTIONS),
    **{edge: tuple(map(str, vocabulary.COORDINATES)) for edge in ("x0", "y0", "x1", "y1")},
}
# The facts of what a question names.
MENTIONED: dict[str, tuple[str, ...]] = {
    **{fact: FACTS[fact] for fact in ("color", "shape", "char", "next", "row", "column")},
    **{edge: FACTS[edge] for edge in ("x0", "y0", "x1", "y1")},
    "found": ("yes", "no"),
    "nth": words.ORDINALS,
}
UNKNOWN = -100  # a fact without a target here; 0 is "nothing", the words start at 1


@cache
def _class_of(fact: str) -> dict[str, int]:
    return {word: number for number, word in enumerate((FACTS | MENTIONED)[fact], 1)}


def mentioned(facts: Mapping[str, str]) -> dict[str, int]:
    """Targets of a mention: the class of each fact, or UNKNOWN."""
    return {
        fact: _class_of(fact).get(facts[fact], UNKNOWN) if fact in facts else UNKNOWN
        for fact in MENTIONED
    }


def known(picture: Picture, grid: Grid) -> dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Targets of a picture's tokens: int64 (tokens,) of each fact.

    Only the token at the middle of a thing has its rank, so things are counted by counting tokens.
    Row and column counts are the numbers of things in the token's third of the picture: small
    numbers, which attention distinguishes more easily, and which add up to the count.
    """
    rows, columns = grid
    width, height = picture.size
    facts = {fact: np.zeros((rows, columns), np.int64) for fact in FACTS}
    for fact, word in picture.facts.items():
        facts[fact][:] = _class_of(fact)[word]
    for fact in ("count", "background"):
        if fact not in picture.facts:
            facts[fact][:] = UNKNOWN
    if "count" in picture.facts:
        boxes = [thing.box for thing in picture.things]
        across = [(box[0] + box[2]) / 2 / width for box in boxes]
        down = [(box[1] + box[3]) / 2 / height for box in boxes]
        facts["column_count"][:] = _in_thirds(across, columns)
        facts["row_count"][:] = _in_thirds(down, rows)[:, None]
    else:
        for fact in ("rank", "row_count", "column_count"):
            facts[fact][:] = UNKNOWN
    covered = np.zeros((rows, columns))
    for thing in picture.things:
        everywhere = {fact: word for fact, word in thing.facts.items() if fact != "rank"}
        x0, x1 = (x / width * columns for x in thing.box[::2])
        y0, y1 = (y / height * rows for y in thing.box[1::2])
        for row in range(max(0, int(y0)), min(rows, int(y1) + 1)):
            for column in range(max(0, int(x0)), min(columns, int(x1) + 1)):
                shared = min(y1, row + 1) - max(y0, row), min(x1, column + 1) - max(x0, column)
                area = max(0.0, shared[0]) * max(0.0, shared[1])
                enough = min(0.3, 0.5 * (x1 - x0) * (y1 - y0))
                if area >= enough and area > covered[row, column]:
                    covered[row, column] = area
                    for fact, word in everywhere.items():
                        facts[fact][row, column] = _class_of(fact)[word]
        row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
        if "rank" in thing.facts and row < rows and column < columns:
            facts["rank"][row, column] = _class_of("rank")[thing.facts["rank"]]
    for glyph in sorted(picture.glyphs, key=lambda glyph: glyph.x):
        row, column = int(glyph.y / height * rows), int(glyph.x / width * columns)
        if not (0 <= row < rows and 0 <= column < columns):
            continue
        if facts["char"][row, column] == 0:
            for fact, word in glyph.facts.items():
                facts[fact][row, column] = _class_of(fact).get(word, UNKNOWN)
        elif facts["next"][row, column] == 0:
            facts["next"][row, column] = _class_of("next")[glyph.facts["char"]]
    return {fact: values.ravel() for fact, values in facts.items()}


def _in_thirds(shares: list[float], tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of positions (0 to 1) in each token's third: (tokens,)."""
    counts = np.bincount([int(share * 3) for share in shares], minlength=3)
    each: np.ndarray[tuple[int], np.dtype[np.int64]] = counts[np.arange(tokens) * 3 // tokens]
    return each
