"""Batches of examples as tensors: patches, tokens, what may be seen from where, and facts.

The pictures of a batch have one grid, so that nothing of them is padding. Several questions about
a picture share it: each is a branch that sees the prefix and itself, at the positions it would have
alone.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from server.demo import phrases, vocabulary, words
from server.demo.examples import Example, chat, several, single
from server.demo.network import CELL, MERGE, PATCH, in_token_order
from server.demo.pictures import COLORS, SHAPES, Picture
from server.demo.scenes import Question, Size

Grid = tuple[int, int]  # rows and columns of tokens

# What each vision token is to know, and the words for it.
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
    "row": ("top", "center", "bottom"),
    "column": ("left", "center", "right"),
    "extreme": ("tallest", "shortest"),
    "motion": tuple(words.DIRECTIONS),
    **{edge: tuple(map(str, vocabulary.COORDINATES)) for edge in ("x0", "y0", "x1", "y1")},
}
UNKNOWN = -100  # a fact that is not to be learned here; 0 is "nothing", the words start at 1

SMALL: tuple[Grid, ...] = ((2, 2), (2, 3), (3, 2), (3, 3), (3, 4), (4, 3), (4, 4), (3, 5), (2, 5))
MEDIUM: tuple[Grid, ...] = (
    (5, 5), (5, 6), (6, 5), (6, 6), (4, 7), (5, 8), (6, 8), (8, 6), (7, 7), (7, 7), (7, 7), (8, 8),
)  # fmt: skip
LARGE: tuple[Grid, ...] = (
    (9, 10), (10, 9), (7, 12), (12, 8), (10, 10), (9, 14), (14, 9), (12, 12), (11, 16), (15, 11),
    (15, 20), (20, 15),
)  # fmt: skip
KINDS = {
    "objects": 0.25,
    "crowd": 0.16,
    "text": 0.36,
    "lines": 0.05,
    "note": 0.05,
    "chart": 0.09,
    "photo": 0.04,
}
SEVERAL, CLIPS, CHATS = 0.12, 0.06, 0.015  # shares of the batches
QUESTIONS = 5  # a picture
CHAT_BATCH = 24


@dataclass(slots=True)
class Batch:
    """Examples of one form. B examples, T tokens, V vision tokens."""

    pictures: list[tuple[Tensor, Grid]]  # uint8 patches (B, patches, pixels of a patch)
    ids: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (3, B, T): time, row, column
    branches: Tensor  # int64 (B, T): 0 the prefix, -1 padding
    weights: Tensor  # float32 (B, T): of answers; 0 elsewhere
    facts: dict[str, Tensor]  # int64 (B, V) each
    answers: list[tuple[int, str, int, int]]  # example, task, start and end in T

    @property
    def mask(self) -> Tensor:
        """bool (B, T, T): what each token may see."""
        branches = self.branches
        mask = branches[:, None, :] == branches[:, :, None]
        return (mask | (branches[:, None, :] == 0)).tril()


class Writer:
    """Writes one example as tokens."""

    def __init__(self, codec: vocabulary.Codec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.branches: list[int] = []
        self.weights: list[float] = []
        self.answers: list[tuple[str, int, int]] = []
        self.position = 0
        self.branch = 0

    def tokens(self, ids: list[int], weight: float = 0.0) -> None:
        for token in ids:
            self.ids.append(token)
            self.positions.append((self.position,) * 3)
            self.branches.append(self.branch)
            self.weights.append(weight)
            self.position += 1

    def text(self, text: str) -> None:
        self.tokens(self.codec.encode(text))

    def vision(self, token: int, grid: Grid) -> None:
        self.tokens([vocabulary.VISION_START])
        rows, columns = grid
        for row in range(rows):
            for column in range(columns):
                self.ids.append(token)
                self.positions.append((self.position, self.position + row, self.position + column))
                self.branches.append(self.branch)
                self.weights.append(0.0)
        self.position += max(grid)
        self.tokens([vocabulary.VISION_END])

    def role(self, name: str) -> None:
        self.tokens([vocabulary.START])
        self.text(f"{name}\n")

    def end(self) -> None:
        self.tokens([vocabulary.END])
        self.text("\n")

    def answer(self, question: Question) -> None:
        """The answer of a turn; its weight falls with its length, as long ones say no more."""
        ids = [*self.codec.encode(question.answer), vocabulary.END]
        start = len(self.ids)
        self.tokens(ids, len(ids) ** -0.5)
        self.answers.append((question.task, start, len(self.ids)))


def _write(
    codec: vocabulary.Codec, rng: random.Random, example: Example, grids: list[Grid], fps: float
) -> Writer:
    questions = _chosen(rng, example.questions)
    before = rng.random() < 0.1  # the question stands before the pictures
    turns = rng.random() < 0.15  # the questions follow each other in one conversation
    if before:
        questions = questions[:1]
    writer = Writer(codec)
    if rng.random() < 0.12:
        writer.role("system")
        writer.text(rng.choice(phrases.SYSTEM))
        writer.end()
    writer.role("user")
    if before:
        writer.text(questions[0].text)
    _write_pictures(writer, example, grids, fps)
    start = writer.position
    for number, question in enumerate(questions, 1):
        if not turns:
            writer.branch, writer.position = number, start
        elif number > 1:
            writer.text("\n")
            writer.role("user")
        if not before:
            writer.text(question.text)
        writer.end()
        writer.role("assistant")
        writer.answer(question)
    return writer


def _write_pictures(writer: Writer, example: Example, grids: list[Grid], fps: float) -> None:
    if not example.clip:
        for number, grid in enumerate(grids, 1):
            writer.text(f"Picture {number}: ")
            writer.vision(vocabulary.IMAGE, grid)
        return
    writer.text("Video 1: ")
    writer.tokens([vocabulary.VISION_START])
    for pair, grid in enumerate(grids):
        writer.text(f"<{(2 * pair + 0.5) / fps:.1f} seconds>")
        writer.vision(vocabulary.VIDEO, grid)
    writer.tokens([vocabulary.VISION_END])


def _chosen(rng: random.Random, questions: list[Question]) -> list[Question]:
    """Some of the questions, by their weights; of one whole-sentence answer at most two."""
    left = list(questions)
    chosen: list[Question] = []
    while left and len(chosen) < QUESTIONS:
        (question,) = rng.choices(left, [it.weight for it in left])
        left.remove(question)
        chosen.append(question)
        if question.task == "outside" and len(chosen) == 2:
            break
    return chosen


def patches(frames: list[Image.Image], grid: Grid) -> Tensor:
    """uint8 (patches, 3 * frames * 16 * 16) of one frame or two, in the order of the tokens."""
    rows, columns = grid
    size = columns * CELL, rows * CELL
    pixels = np.stack(
        [
            np.asarray(
                frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)
            )
            for frame in frames
        ]
    )
    cut = torch.from_numpy(pixels).view(len(frames), rows * MERGE, PATCH, columns * MERGE, PATCH, 3)
    return in_token_order(cut.permute(1, 3, 5, 0, 2, 4).flatten(2).contiguous())


@cache
def _class_of(fact: str) -> dict[str, int]:
    return {word: number for number, word in enumerate(FACTS[fact], 1)}


def known(picture: Picture, grid: Grid) -> dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """What each token of a picture is to know: (tokens,) of each fact."""
    rows, columns = grid
    width, height = picture.size
    facts = {fact: np.zeros((rows, columns), np.int64) for fact in FACTS}
    for fact, word in picture.facts.items():
        facts[fact][:] = _class_of(fact)[word]
    for fact in ("count", "background"):
        if fact not in picture.facts:
            facts[fact][:] = UNKNOWN
    covered = np.zeros((rows, columns))
    for thing in picture.things:
        x0, x1 = (x / width * columns for x in thing.box[::2])
        y0, y1 = (y / height * rows for y in thing.box[1::2])
        for row in range(max(0, int(y0)), min(rows, int(y1) + 1)):
            for column in range(max(0, int(x0)), min(columns, int(x1) + 1)):
                shared = min(y1, row + 1) - max(y0, row), min(x1, column + 1) - max(x0, column)
                area = max(0.0, shared[0]) * max(0.0, shared[1])
                enough = min(0.3, 0.5 * (x1 - x0) * (y1 - y0))
                if area >= enough and area > covered[row, column]:
                    covered[row, column] = area
                    for fact, word in thing.facts.items():
                        facts[fact][row, column] = _class_of(fact)[word]
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


def collate(
    codec: vocabulary.Codec, rng: random.Random, examples: list[Example], grids: list[Grid]
) -> Batch:
    """A batch of examples with as many pictures each as there are grids (pairs of frames, of a
    clip)."""
    fps = rng.choice([1.0, 2.0, 4.0, 5.0, 8.0, 10.0, 24.0])
    written = [_write(codec, rng, example, grids, fps) for example in examples]
    length = max(len(writer.ids) for writer in written)
    count = len(written)
    ids = np.zeros((count, length), np.int64)
    positions = np.zeros((3, count, length), np.int64)
    branches = np.full((count, length), -1, np.int64)
    weights = np.zeros((count, length), np.float32)
    answers = []
    for row, writer in enumerate(written):
        end = len(writer.ids)
        ids[row, :end] = writer.ids
        positions[:, row, :end] = np.array(writer.positions).T
        branches[row, :end] = writer.branches
        weights[row, :end] = writer.weights
        answers += [(row, *answer) for answer in writer.answers]
    parts = [[_part(example, index) for example in examples] for index in range(len(grids))]
    facts: dict[str, Tensor] = {}
    if grids:
        all_known = [
            [known(picture, grid) for picture in part]
            for part, grid in zip(parts, grids, strict=True)
        ]
        facts = {
            fact: torch.from_numpy(
                np.concatenate([np.stack([it[fact] for it in part]) for part in all_known], 1)
            )
            for fact in FACTS
        }
    return Batch(
        [
            (torch.stack([patches(picture.frames, grid) for picture in part]), grid)
            for part, grid in zip(parts, grids, strict=True)
        ],
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(branches),
        torch.from_numpy(weights),
        facts,
        answers,
    )


def _part(example: Example, index: int) -> Picture:
    """A picture of an example, or a pair of frames of its clip."""
    if not example.clip:
        return example.pictures[index]
    (clip,) = example.pictures
    pair = slice(2 * index, 2 * index + 2)
    return Picture(clip.frames[pair], clip.facts, [clip.things[2 * index]])


def cost(grids: list[Grid]) -> float:
    """The work of one example, in tokens of text: what vision, attention and questions need."""
    tokens = sum(rows * columns for rows, columns in grids)
    attention = sum((rows * columns) ** 2 for rows, columns in grids)
    return 9.0 * tokens + 0.05 * attention + 120


def draw(codec: vocabulary.Codec, rng: random.Random, progress: float, budget: float) -> Batch:
    """A batch of about `budget` in cost. With `progress`, from 0 to 1, pictures become larger."""
    share = rng.random()
    if share < CHATS:
        return collate(codec, rng, [chat(rng) for _ in range(CHAT_BATCH)], [])
    share = rng.random()
    if share < CLIPS:
        grid = rng.choice([(3, 3), (4, 4), (5, 5)] if progress < 0.3 else [(4, 5), (6, 6), (7, 7)])
        frames = rng.choice([4, 6, 8])
        grids = [grid] * (frames // 2)
        examples = [
            single(rng, "clip", _size(rng, grid), frames=frames)
            for _ in range(_batch_size(grids, budget))
        ]
        return collate(codec, rng, examples, grids)
    if share < CLIPS + SEVERAL and progress > 0.05:
        pool = [it for it in (*SMALL, *MEDIUM) if min(it) >= 3] if progress < 0.4 else MEDIUM
        grids = [rng.choice(pool) for _ in range(rng.choice([2, 2, 2, 3, 4]))]
        examples = [
            several(rng, [_size(rng, grid) for grid in grids])
            for _ in range(_batch_size(grids, budget))
        ]
        return collate(codec, rng, examples, grids)
    grid = rng.choice(_pool(rng, progress))
    kinds = dict(KINDS)
    if min(grid) < 3:
        kinds |= {"crowd": 0.05, "lines": 0.0, "note": 0.0, "chart": 0.0}
    examples = [
        single(rng, rng.choices(list(kinds), list(kinds.values()))[0], _size(rng, grid))
        for _ in range(_batch_size([grid], budget))
    ]
    return collate(codec, rng, examples, [grid])


def _pool(rng: random.Random, progress: float) -> tuple[Grid, ...]:
    if progress < 0.1:
        small, large = 0.75, 0.0
    elif progress < 0.4:
        small, large = 0.3, 0.04
    else:
        small, large = 0.12, 0.2
    share = rng.random()
    return SMALL if share < small else LARGE if share > 1 - large else MEDIUM


def _size(rng: random.Random, grid: Grid) -> Size:
    """The size at which a picture of a grid is drawn: mostly its own, else it will be resized."""
    height, width = (side * CELL for side in grid)
    if rng.random() < 0.6:
        return width, height
    scale = rng.uniform(0.95, 1.5)
    return round(width * scale * rng.uniform(0.93, 1.07)), round(height * scale)


def _batch_size(grids: list[Grid], budget: float) -> int:
    return max(2, min(96, round(budget / cost(grids))))
