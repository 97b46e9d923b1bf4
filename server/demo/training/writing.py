"""Writes examples as tokens of a conversation, with positions, branches and weights."""

import random
import re
from collections.abc import Mapping

from server.demo.training import phrases, vocabulary
from server.demo.training.examples import Example
from server.demo.training.scene import Question
from server.demo.training.targets import Grid

QUESTIONS = 8  # about a small picture
MOST_QUESTIONS = 16  # about a large one, whose encoding costs more than the questions
_QUESTION_TOKENS = 20  # vision tokens per additional question


class Writer:
    """Writes one example as tokens."""

    def __init__(self, codec: vocabulary.Codec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.branches: list[int] = []
        self.weights: list[float] = []
        self.answers: list[tuple[str, int, int]] = []
        self.mentions: list[tuple[int, Mapping[str, str]]] = []
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

    def question(self, question: Question) -> None:
        """Writes a question and records the last token of each of its mentions."""
        start = len(self.ids)
        self.text(question.text)
        for mention in question.mentions:
            if found := re.search(rf"\b{re.escape(mention.name)}\b", question.text):
                before = self.codec.encode(question.text[: found.end()])
                self.mentions.append((start + len(before) - 1, mention.facts))

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
        """Writes an answer. The longer it is, the less each of its tokens weighs in the loss."""
        ids = [*self.codec.encode(question.answer), vocabulary.END]
        start = len(self.ids)
        if question.spelling:
            before = question.answer[: question.answer.index(question.spelling.text)]
            first = start + len(self.codec.encode(before)) - 1  # before the first character
            self.mentions += list(enumerate(question.spelling.facts, first))
        self.tokens(ids, len(ids) ** -0.5)
        self.answers.append((question.task, start, len(self.ids)))


def write(
    codec: vocabulary.Codec, rng: random.Random, example: Example, grids: list[Grid], fps: float
) -> Writer:
    tokens = sum(rows * columns for rows, columns in grids)
    count = min(MOST_QUESTIONS, QUESTIONS + tokens // _QUESTION_TOKENS)
    questions = _chosen(rng, example.questions, count)
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
            writer.question(question)
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


def _chosen(rng: random.Random, questions: list[Question], count: int) -> list[Question]:
    """A random choice of questions by weight; at most two that have the answer OUTSIDE."""
    left = list(questions)
    chosen: list[Question] = []
    while left and len(chosen) < count:
        (question,) = rng.choices(left, [it.weight for it in left])
        left.remove(question)
        chosen.append(question)
        if question.task == "outside" and len(chosen) == 2:
            break
    return chosen
