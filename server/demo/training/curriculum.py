"""The schedule of training data: kinds of examples, sizes of pictures, sizes of batches."""

import random

from server.demo.drawing import Size
from server.demo.training.batches import Batch, collate
from server.demo.training.examples import Example, chat, several, single
from server.demo.training.objects import mosaic, traffic
from server.demo.training.targets import Grid
from server.demo.training.texts import page
from server.demo.training.vision import CELL
from server.demo.training.vocabulary import Codec

SMALL: tuple[Grid, ...] = ((2, 2), (2, 3), (3, 2), (3, 3), (3, 4), (4, 3), (4, 4), (3, 5), (2, 5))
MEDIUM: tuple[Grid, ...] = (
    (5, 5), (5, 6), (6, 5), (6, 6), (4, 7), (5, 8), (6, 8), (8, 6), (7, 7), (7, 7), (7, 7), (8, 8),
)  # fmt: skip
LARGE: tuple[Grid, ...] = (
    (9, 10), (10, 9), (7, 12), (12, 8), (10, 10), (9, 14), (14, 9), (12, 12), (11, 16), (15, 11),
    (15, 20), (20, 15),
)  # fmt: skip
# Kinds with many possible questions, and kinds with few. A batch has kinds of one group, to limit
# its padding.
MUCH = {"objects": 0.45, "text": 0.42, "chart": 0.09, "photo": 0.04}
LITTLE = {"crowd": 0.84, "lines": 0.08, "note": 0.08}
SEVERAL, CLIPS, CHATS = 0.3, 0.03, 0.015  # shares of the batches
SEVERAL_GROW = 0.5  # progress from which these pictures are no longer all small
SEVERAL_POOLS = (0.1, 0.5, 0.4)  # shares of small, medium and large pictures from then on
SEVERAL_LAST = (0.05, 0.35, 0.6)  # the same from LAST on
SEVERAL_MOST = 1.6  # maximum cost of one such example, as a share of a batch's budget
LAST = 0.94  # progress from which most pictures are large
LITTLES = 0.45  # share among batches of single pictures
LARGER = 2.0  # factor on their share of large pictures, in which counting is harder
LARGEST = 0.7  # maximum share of large pictures
CHAT_BATCH = 24
SEEING, SEEING_UNTIL = (0.85, 0.1), 0.18  # share of batches without questions, before and after
TRAFFIC = 0.15  # share of these batches whose objects move
QUESTIONS_COST, FEW_COST = 360.0, 180.0  # cost of an example's questions


def cost(grids: list[Grid]) -> float:
    """The cost of one example's pictures; 18 units are about a millisecond on one core."""
    tokens = sum(rows * columns for rows, columns in grids)
    attention = sum((rows * columns) ** 2 for rows, columns in grids)
    return 9.0 * tokens + 0.05 * attention


def draw(
    codec: Codec, rng: random.Random, form: random.Random, progress: float, budget: float
) -> Batch:
    """Draws a batch that costs about `budget`. As `progress` goes from 0 to 1, pictures grow.

    `form` decides the kind of batch and the grids of its pictures: batches of equal `form` can be
    joined, and cost the same.
    """
    if form.random() < (SEEING[0] if progress < SEEING_UNTIL else SEEING[1]):
        return _seeing(codec, rng, form, progress, budget)
    share = form.random()
    if share < CHATS:
        return collate(codec, rng, [chat(rng) for _ in range(CHAT_BATCH)], [])
    share = form.random()
    if share < CLIPS:
        grid = form.choice([(3, 3), (4, 4), (5, 5)] if progress < 0.6 else [(4, 5), (6, 6), (7, 7)])
        frames = form.choice([4, 6, 8])
        grids = [grid] * (frames // 2)
        examples = [
            single(rng, "clip", _size(rng, grid), frames=frames)
            for _ in range(_batch_size(grids, budget))
        ]
        return collate(codec, rng, examples, grids)
    if share < CLIPS + SEVERAL and progress > 0.05:
        grids = _several(form, progress, budget)
        examples = [
            several(rng, [_size(rng, grid) for grid in grids])
            for _ in range(_batch_size(grids, budget))
        ]
        return collate(codec, rng, examples, grids)
    little = form.random() < LITTLES
    grid = form.choice(_pool(form, progress, LARGER if little else 1.0))
    little = little and min(grid) >= 3
    kinds = LITTLE if little else MUCH if min(grid) >= 3 else MUCH | {"chart": 0.0}
    count = _batch_size([grid], budget, FEW_COST if little else QUESTIONS_COST)
    examples = [
        single(rng, rng.choices(list(kinds), list(kinds.values()))[0], _size(rng, grid))
        for _ in range(count)
    ]
    return collate(codec, rng, examples, [grid])


def _several(form: random.Random, progress: float, budget: float) -> list[Grid]:
    """The grids of two to four pictures."""
    count = form.choice([2, 2, 2, 3, 4])
    small = [grid for grid in SMALL if min(grid) >= 3]
    if progress >= SEVERAL_GROW:
        for _ in range(10):
            shares = SEVERAL_POOLS if progress < LAST else SEVERAL_LAST
            pools = form.choices((small, MEDIUM, LARGE), shares, k=count)
            grids = [form.choice(pool) for pool in pools]
            if cost(grids) < budget * SEVERAL_MOST:
                return grids
    return form.choices(small, k=count)


def _seeing(
    codec: Codec, rng: random.Random, form: random.Random, progress: float, budget: float
) -> Batch:
    """Pictures full of shapes and glyphs, from which only the vision encoder learns."""
    grid = form.choice(_pool(form, min(1.0, 2 * progress)))
    count = _batch_size([grid], budget, 0.0)
    makers = (traffic,) if form.random() < TRAFFIC else (page, page, mosaic)
    examples = [Example([rng.choice(makers)(rng, _size(rng, grid))], []) for _ in range(count)]
    return collate(codec, rng, examples, [grid])


def _pool(form: random.Random, progress: float, larger: float = 1.0) -> tuple[Grid, ...]:
    if progress < 0.1:
        small, large = 0.75, 0.0
    elif progress < 0.5:
        small, large = 0.45, 0.03
    elif progress < 0.75:
        small, large = 0.25, 0.12
    elif progress < LAST:
        small, large = 0.1, 0.25
    else:
        small, large = 0.05, 0.65
    share = form.random()
    large = min(LARGEST, large * larger)
    return SMALL if share < small else LARGE if share > 1 - large else MEDIUM


def _size(rng: random.Random, grid: Grid) -> Size:
    """The size at which a picture is drawn: mostly its grid's, otherwise it is resized later."""
    height, width = (side * CELL for side in grid)
    if rng.random() < 0.6:
        return width, height
    scale = rng.uniform(0.95, 1.5)
    return round(width * scale * rng.uniform(0.93, 1.07)), round(height * scale)


def _batch_size(grids: list[Grid], budget: float, questions: float = QUESTIONS_COST) -> int:
    return max(2, min(96, round(budget / (cost(grids) + questions))))
