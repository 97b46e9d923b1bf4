"""Pictures of the model's world, each with questions and their answers.

A maker takes a source of chance, the size of the picture in pixels and whether it is for the
evaluation (`held_out`: fonts, words, wordings, layouts and backgrounds that training never shows).
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

from server.demo import words
from server.demo.fonts import font
from server.demo.outside import outside
from server.demo.phrases import wording
from server.demo.pictures import (
    COLORS,
    SHAPES,
    Box,
    Glyph,
    Lettering,
    Picture,
    Thing,
    alike,
    background,
    background_color,
    contrasting,
    draw_shape,
    place,
    rgb,
    wear,
)

MIN_SIDE = 18  # pixels of an object
MIN_FONT = 15  # pixels
LARGEST_FONT = 96  # pixels, of most texts
FRAME = 5  # pixels from the edge
MARGIN = 0.05  # how far, as a share of the picture, a position stays from where its name changes
ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture. `task` is its name in the evaluation."""

    task: str
    text: str
    answer: str
    weight: float = 1.0


@dataclass(slots=True)
class Scene:
    """A picture and what can be asked about it. `label` says what it is, "a red circle"."""

    picture: Picture
    questions: list[Question]
    label: str
    color: str = ""
    shape: str = ""
    text: str = ""


Size = tuple[int, int]
Maker = Callable[[random.Random, Size, bool], Scene]


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a scene."""

    color: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def label(self) -> str:
        return words.article(self.name)

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def thousandths(box: Box, size: Size) -> list[int]:
    """A box in thousandths of the picture, to the nearest ten."""
    shares = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    return [min(1000, max(0, round(share * 100) * 10)) for share in shares]


def cell(center: tuple[float, float], size: Size) -> tuple[str, str] | None:
    """The row and the column of a place in a grid of 3 by 3; None if it is near another one."""
    shares = center[0] / size[0], center[1] / size[1]
    if any(abs(share - edge) < MARGIN for share in shares for edge in (1 / 3, 2 / 3)):
        return None
    return ROWS[int(shares[1] * 3)], COLUMNS[int(shares[0] * 3)]


def position(row: str, column: str) -> str:
    """The name of a place: "top left", "left", "center"."""
    if row == "center":
        return column
    return row if column == "center" else f"{row} {column}"


def _place_facts(box: Box, size: Size) -> dict[str, str]:
    center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    facts = dict(zip(("x0", "y0", "x1", "y1"), map(str, thousandths(box, size)), strict=True))
    if found := cell(center, size):
        facts["row"], facts["column"] = found
    return facts


def _items(rng: random.Random, count: int, behind: str) -> list[tuple[str, str]]:
    """Colors and shapes, no two of which share or nearly share one."""
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        color, shape = contrasting(rng, behind), rng.choice(SHAPES)
        if all(not alike(color, other) and shape != name for other, name in chosen):
            chosen.append((color, shape))
        elif rng.random() < 0.05:
            chosen.clear()
    return chosen


def _draw_items(
    rng: random.Random, picture: Picture, kinds: list[tuple[str, str]], boxes: list[Box]
) -> list[Item]:
    """Draws objects; they come back from left to right."""
    items = [Item(color, shape, box) for (color, shape), box in zip(kinds, boxes, strict=False)]
    items.sort(key=lambda item: item.center[0])
    for rank, item in enumerate(items, 1):
        draw_shape(rng, picture.image, item.shape, item.color, item.box)
        facts = {"color": item.color, "shape": item.shape, "rank": str(rank)}
        picture.things.append(Thing(item.box, facts | _place_facts(item.box, picture.size)))
    picture.facts["count"] = str(len(items))
    return items


def _blank(rng: random.Random, size: Size, kind: str, held_out: bool) -> tuple[Picture, str]:
    color = background_color(rng)
    image = background(rng, *size, color, held_out=held_out)
    return Picture([image], {"kind": kind, "background": color}), color


def _caption(labels: list[str], behind: str) -> str:
    return f"{words.enumeration(labels)} on {words.article(behind)} background"


def objects(rng: random.Random, size: Size, held_out: bool, count: int | None = None) -> Scene:
    """One to three objects that differ in color and shape."""
    if count is None:
        count = rng.choice([1, 1, 2, 2, 2, 3]) if min(size) >= 120 else rng.choice([1, 1, 2])
    picture, behind = _blank(rng, size, "shapes", held_out)
    sides = {1: (0.22, 0.8), 2: (0.18, 0.45), 3: (0.16, 0.36)}[count]
    short = min(size)
    smallest = max(MIN_SIDE, short * sides[0])
    boxes = place(rng, size, count, (smallest, max(smallest, short * sides[1])))
    items = _draw_items(rng, picture, _items(rng, count, behind), boxes)
    ask = _Asker(rng, held_out)
    for item in items:
        _ask_item(ask, item, size, alone=len(items) == 1)
    ask("background", "background", behind, 0.7)
    ask("caption", "caption", _caption([item.label for item in items], behind), 1.5)
    ask("count", "count", str(len(items)), 0.4)
    _ask_presence(ask, items)
    if len(items) == 1:
        _ask_json(ask, items[0], size, behind)
        ask("what", "what", items[0].label, 1.5)
    else:
        listed = [{"color": item.color, "shape": item.shape} for item in items]
        ask("json_objects", "json", json.dumps({"objects": listed}), 0.4, keys="objects")
        _ask_sides(ask, items, size)
    only = items[0]
    return Scene(picture, ask.questions, only.label, only.color, only.shape)


class _Asker:
    """Collects questions in varied wordings."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.questions: list[Question] = []

    def __call__(
        self, task: str, wordings: str, answer: str, weight: float = 1.0, /, **slots: str
    ) -> None:
        text = wording(self.rng, wordings, held_out=self.held_out, **slots)
        self.questions.append(Question(task, text, answer, weight))


def _ask_item(ask: _Asker, item: Item, size: Size, *, alone: bool) -> None:
    rng = ask.rng
    name = rng.choice([item.name, item.shape])
    if alone and rng.random() < 0.6:
        ask("color", "color_only", item.color)
        ask("shape", "shape_only", item.shape)
        name = rng.choice([name, "object"])
    else:
        ask("color", "color", item.color, shape=item.shape)
        ask("shape", "shape", item.shape, color=item.color)
    box = json.dumps(thousandths(item.box, size))
    ask("box", "box", box, object=rng.choice([item.name, item.shape]))
    if found := cell(item.center, size):
        ask("position", "position", position(*found), 1.5, object=name)


def _ask_presence(ask: _Asker, items: list[Item]) -> None:
    """A question that is answered with yes, and one that is answered with no."""
    rng = ask.rng
    one = rng.choice(items)
    ask("yes_no", "yes_no", "yes", object=rng.choice([one.name, one.name, one.shape]))
    names = {item.name for item in items}
    absent = [shape for shape in SHAPES if all(item.shape != shape for item in items)]
    colors = [color for color in COLORS if not any(alike(color, item.color) for item in items)]
    choices = [f"{one.color} {rng.choice(absent)}", f"{rng.choice(colors)} {one.shape}"]
    choices += [f"{rng.choice(colors)} {rng.choice(absent)}", rng.choice(absent)]
    if len(items) > 1:
        other = rng.choice([item for item in items if item != one])
        choices += [f"{one.color} {other.shape}"] * 2
    ask("yes_no", "yes_no", "no", object=rng.choice([it for it in choices if it not in names]))


def _ask_json(ask: _Asker, item: Item, size: Size, behind: str) -> None:
    facts = {"color": item.color, "shape": item.shape, "background": behind}
    if found := cell(item.center, size):
        facts["position"] = position(*found)
    keys = ask.rng.sample(list(facts), ask.rng.randint(2, min(3, len(facts))))
    answer = json.dumps({key: facts[key] for key in keys})
    ask("json", "json", answer, keys=words.enumeration(keys))


def _ask_sides(ask: _Asker, items: list[Item], size: Size) -> None:
    rng = ask.rng
    for axis, low, high, kind in ((0, "left", "right", "side"), (1, "above", "below", "height")):
        one, other = rng.sample(items, 2)
        apart = (one.center[axis] - other.center[axis]) / size[axis]
        across = (one.center[1 - axis] - other.center[1 - axis]) / size[1 - axis]
        if abs(apart) > 0.12 and (rng.random() < 0.7 or abs(apart) > abs(across)):
            names = {"object": rng.choice([one.name, one.shape]), "other": other.name}
            if rng.random() < 0.5:
                names["other"] = other.shape
            ask("side", kind, low if apart < 0 else high, 1.5, **names)
        ends = (("left", "right"), ("top", "bottom"))[axis]
        ordered = sorted(items, key=lambda item: item.center[axis])
        for side, item, neighbor in (
            (ends[0], ordered[0], ordered[1]),
            (ends[1], ordered[-1], ordered[-2]),
        ):
            if abs(item.center[axis] - neighbor.center[axis]) / size[axis] > 0.12:
                ask("at_side", "at_side", item.label, 0.4, side=side)


def crowd(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """One to nine objects, all alike or of several kinds."""
    picture, behind = _blank(rng, size, "shapes", held_out)
    count = rng.randint(1, 9 if min(size) >= 120 else 4)
    kinds = [
        (contrasting(rng, behind), rng.choice(SHAPES)) for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    mixed = rng.random() < 0.3
    chosen = [
        (contrasting(rng, behind), rng.choice(SHAPES)) if mixed else rng.choice(kinds)
        for _ in range(count)
    ]
    short = min(size)
    if held_out and count > 1:
        boxes = _rows(rng, size, count)
    else:
        smallest = max(MIN_SIDE, short * 0.1)
        boxes = place(rng, size, count, (smallest, max(smallest, short * rng.uniform(0.15, 0.3))))
    items = _draw_items(rng, picture, chosen, boxes)
    count = len(items)
    ask = _Asker(rng, held_out)
    ask("count", "count", str(count), 4)
    ask("background", "background", behind, 0.3)
    colors, shapes = {item.color for item in items}, {item.shape for item in items}
    if len(shapes) > 1 or rng.random() < 0.2:
        shape = rng.choice(sorted(shapes))
        number = sum(item.shape == shape for item in items)
        ask("count_kind", "count_kind", str(number), 1.0, shapes=words.plural(shape))
    if len(colors) == len(shapes) == 1:
        only = items[0]
        label = only.label
        if count > 1:
            label = f"{words.NUMBERS[count]} {only.color} {words.plural(only.shape)}"
        ask("caption", "caption", _caption([label], behind), 1.0)
        facts = {"count": count, "color": only.color, "shape": only.shape}
        keys = rng.sample(list(facts), 2)
        answer = json.dumps({key: facts[key] for key in keys})
        ask("json", "json", answer, 0.5, keys=words.enumeration(keys))
    return Scene(picture, ask.questions, "")


def _rows(rng: random.Random, size: Size, count: int) -> list[Box]:
    """Boxes in rows, a little moved: a layout that training does not show."""
    columns = rng.randint(max(2, -(-count // 3)), min(count, 5))
    rows = -(-count // columns)
    width, height = size[0] / columns, size[1] / rows
    side = min(width, height) * rng.uniform(0.45, 0.75)
    boxes = []
    for index in range(count):
        x = (index % columns) * width + rng.uniform(2, width - side - 2)
        y = (index // columns) * height + rng.uniform(2, height - side - 2)
        boxes.append((x, y, x + side, y + side))
    return boxes


def _fitting(
    rng: random.Random, texts: list[str], room: Size, held_out: bool, smallest: float
) -> list[Lettering] | None:
    """Texts in one font that fit into a room side by side with none; None if they do not."""
    largest = min(room[1] * 0.9, LARGEST_FONT if rng.random() < 0.85 else 2 * LARGEST_FONT)
    height = int(smallest * max(1.0, largest / smallest) ** rng.random())
    letters = font(rng, height, held_out=held_out)
    widest = max(letters.getlength(text) for text in texts)
    if widest > room[0]:
        height = int(height * room[0] / widest * 0.97)
        if height < smallest:
            return None
        letters = letters.font_variant(size=height)
    stroke = 1 if not held_out and height > 24 and rng.random() < 0.1 else 0
    made = [Lettering.of(text, letters, stroke) for text in texts]
    if any(line.width > room[0] or line.height > room[1] for line in made):
        return None
    return made


def text(rng: random.Random, size: Size, held_out: bool, glyph: float | None = None) -> Scene:
    """One text of 1 to 8 characters; `glyph` is the least height of its ink in pixels."""
    picture, behind = _blank(rng, size, "text", held_out)
    if held_out:
        _frame(rng, picture, behind)
    smallest = MIN_FONT if glyph is None else glyph * 1.4
    edge = 2 * FRAME if held_out else 4
    room = size[0] - 2 * edge, size[1] - 2 * edge
    while True:
        content = words.content(rng, held_out=held_out)
        made = _fitting(rng, [content], room, held_out, smallest)
        if made and (glyph is None or made[0].height >= glyph):
            break
    (line,) = made
    color = contrasting(rng, behind) if rng.random() < 0.6 else "black"
    if alike(color, behind):
        color = contrasting(rng, behind)
    margin = edge - 1
    x = rng.uniform(margin, size[0] - line.width - margin)
    y = rng.uniform(margin, size[1] - line.height - margin)
    box = line.draw(picture.image, x, y, rgb(rng, color))
    facts = {"color": color, "shape": "text"}
    picture.things.append(Thing(box, facts | _place_facts(box, size)))
    picture.glyphs += line.glyphs(x, y, {})
    ask = _Asker(rng, held_out)
    ask("read", "read", content, 4)
    ask("text_color", "color", color, 0.4, shape="text")
    ask("background", "background", behind, 0.3)
    label = f'the text "{content}"'
    ask("what", "what", label, 0.4)
    ask("text_caption", "caption", _caption([f"{label} in {color}"], behind), 0.3)
    ask("json_text", "json", json.dumps({"text": content}), 0.4, keys="text")
    return Scene(picture, ask.questions, label, color, "text", content)


def _frame(rng: random.Random, picture: Picture, behind: str) -> None:
    """A thin frame near the edge: a layout that training does not show."""
    right, bottom = picture.size[0] - FRAME, picture.size[1] - FRAME
    color = rgb(rng, contrasting(rng, behind))
    ImageDraw.Draw(picture.image).rectangle((FRAME, FRAME, right, bottom), outline=color)


def lines(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """Two to five lines of one text each."""
    picture, behind = _blank(rng, size, "text", held_out)
    count = rng.randint(2, max(2, min(5, size[1] // 40)))
    texts = [words.content(rng, held_out=held_out) for _ in range(count)]
    ask = _Asker(rng, held_out)
    for number, shown in _write_lines(rng, picture, behind, texts, texts, held_out):
        slots = {"line": words.ORDINALS[number - 1], "number": str(number)}
        ask("read_line", "read_line", shown, **slots)
    ask("background", "background", behind, 0.2)
    return Scene(picture, ask.questions, "a text")


def _write_lines(
    rng: random.Random,
    picture: Picture,
    behind: str,
    texts: list[str],
    values: list[str],
    held_out: bool,
) -> list[tuple[int, str]]:
    """Writes lines below each other; the end of each is its value. Those that fit come back."""
    width, height = picture.size
    pitch = (height - 6) / len(texts)
    made = None
    for _ in range(20):
        room = width - 10, round(pitch * 0.82)
        made = _fitting(rng, texts, room, held_out, min(MIN_FONT, pitch * 0.7))
        if made:
            break
    if not made:
        return []
    letters = made[0].font
    color = rgb(rng, "black" if not alike("black", behind) else "white")
    gap = rng.uniform(max(line.height for line in made) * 1.2, pitch) if pitch > 22 else pitch
    y = rng.uniform(3, max(3.5, height - 3 - gap * len(made)))
    aligned = rng.random() < 0.6
    left = rng.uniform(4, max(4.5, width - 5 - max(line.width for line in made)))
    written = []
    for number, (line, value) in enumerate(zip(made, values, strict=True), 1):
        x = left if aligned else rng.uniform(4, max(4.5, width - 5 - line.width))
        box = line.draw(picture.image, x, y, color)
        label = line.text[: len(line.text) - len(value)]
        facts = {"line": words.ORDINALS[number - 1]}
        picture.things.append(Thing(box, {**facts, "shape": "text"}))
        if label:
            picture.glyphs += Lettering.of(label, letters).glyphs(x, y, facts)
        owner = {"owner": label.strip(" :").lower()} if label else {}
        start = x + letters.getlength(label)
        shown = Lettering.of(value, letters)
        picture.glyphs += [
            Glyph(glyph.x, y + line.height / 2, glyph.facts)
            for glyph in shown.glyphs(start + shown.ink[0], y, facts | owner)
        ]
        written.append((number, value))
        y += gap
        if held_out and number < len(made):  # a rule, which training does not show
            rule = round(y - (gap - line.height) / 2)
            picture.image.paste(color, (4, rule, width - 4, rule + 1))
    return written


def note(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A note or receipt: lines of a label and a value."""
    picture, behind = _blank(rng, size, "note", held_out)
    count = rng.randint(1, max(1, min(5, size[1] // 40)))
    labels = rng.sample(list(words.LABELS), count)
    values = [words.value(rng, words.LABELS[label], held_out=held_out) for label in labels]
    mark = rng.choice(["", ":", ":"])
    texts = [f"{label.upper()}{mark} {value}" for label, value in zip(labels, values, strict=True)]
    ask = _Asker(rng, held_out)
    for number, value in _write_lines(rng, picture, behind, texts, values, held_out):
        ask("read_label", "read_label", value, label=labels[number - 1])
    ask("background", "background", behind, 0.2)
    return Scene(picture, ask.questions, "a note")


def chart(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A bar chart: bars of different colors, most with their values above them."""
    picture, behind = _blank(rng, size, "chart", held_out)
    width, height = size
    colors: list[str] = []
    for _ in range(60):
        color = contrasting(rng, behind)
        if not any(alike(color, other) for other in colors):
            colors.append(color)
    most = 3 if width < 130 else 4 if width < 200 else 6
    colors = colors[: rng.randint(2, most)]
    count = len(colors)
    values = rng.sample(range(6, 100), count)
    while sorted(values)[-1] - sorted(values)[-2] < 8 or sorted(values)[1] - sorted(values)[0] < 8:
        values = rng.sample(range(6, 100), count)
    left, right = width * rng.uniform(0.04, 0.14), width * rng.uniform(0.88, 0.97)
    bottom = height * rng.uniform(0.86, 0.95)
    pitch = (right - left) / count
    share = rng.uniform(0.35, 0.5) if held_out else rng.uniform(0.5, 0.88)
    printed = pitch >= 30 and rng.random() < 0.75
    letters = font(rng, int(min(pitch * 0.6, height * 0.14, 34)), held_out=held_out)
    top = height * rng.uniform(0.04, 0.12) + (letters.size * 1.2 if printed else 0)
    line_color = rgb(rng, "white" if alike(behind, "black") or behind in _DARK else "black")
    _axes(rng, picture, (left, top, right, bottom), line_color, held_out)
    for rank, (color, value) in enumerate(zip(colors, values, strict=True), 1):
        x = left + pitch * (rank - 1 + (1 - share) / 2)
        box = (x, bottom - (bottom - top) * value / 100, x + pitch * share, bottom)
        bounds = tuple(round(edge) for edge in box)
        picture.image.paste(rgb(rng, color), (bounds[0], bounds[1], bounds[2], bounds[3]))
        facts = {"color": color, "shape": "bar", "rank": str(rank)}
        if value in (max(values), min(values)):
            facts["extreme"] = "tallest" if value == max(values) else "shortest"
        picture.things.append(Thing(box, facts))
        if printed:
            shown = Lettering.of(str(value), letters)
            start = x + (pitch * share - shown.width) / 2, box[1] - shown.height - 3
            shown.draw(picture.image, *start, line_color)
            picture.glyphs += shown.glyphs(*start, {"owner": color})
    picture.facts["count"] = str(count)
    ask = _Asker(rng, held_out)
    ask("tallest", "tallest", colors[values.index(max(values))], 2)
    ask("shortest", "shortest", colors[values.index(min(values))], 2)
    ask("bars", "bars", str(count), 0.5)
    ask("background", "background", behind, 0.3)
    label = f"a bar chart with {words.NUMBERS[count]} bars"
    ask("chart_caption", "caption", _caption([label], behind), 0.4)
    ask("what", "what", "a bar chart", 0.2)
    if printed:
        for color, value in zip(colors, values, strict=True):
            ask("value", "value", str(value), 0.6, color=color)
    return Scene(picture, ask.questions, "a bar chart")


_DARK = frozenset({"black", "blue", "purple", "brown", "green", "red"})


def _axes(
    rng: random.Random, picture: Picture, area: Box, color: tuple[int, int, int], held_out: bool
) -> None:
    left, top, right, bottom = (round(edge) for edge in area)
    image = picture.image
    if held_out:  # lines across, which training does not show
        for share in (0.25, 0.5, 0.75, 1.0):
            y = round(bottom - (bottom - top) * share)
            image.paste(color, (left, y, right, y + 1))
    if held_out or rng.random() < 0.7:
        image.paste(color, (left, bottom, right, bottom + 2))
    if rng.random() < 0.6:
        image.paste(color, (left - 2, top, left, bottom + 2))


def photo(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A picture outside the model's world, about which anything may be asked."""
    image = outside(rng, *size, held_out=held_out)
    picture = Picture([image], {"kind": "photo"})
    ask = _Asker(rng, held_out)
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    for kind, slots in (
        ("what", {}),
        ("caption", {}),
        ("read", {}),
        ("color_only", {}),
        ("count", {}),
        ("shape_only", {}),
        ("background", {}),
        ("tallest", {}),
        ("box", {"object": f"{color} {shape}"}),
        ("position", {"object": f"{color} {shape}"}),
        ("json", {"keys": "color and shape"}),
    ):
        weight = 4.0 if kind in {"what", "caption"} else 1.0
        ask("outside", kind, words.OUTSIDE, weight, **slots)
    return Scene(picture, ask.questions, words.OUTSIDE)


def clip(rng: random.Random, size: Size, held_out: bool, frames: int | None = None) -> Scene:
    """4 to 8 frames of an object that moves in one direction."""
    picture, behind = _blank(rng, size, "shapes", held_out)
    still = picture.image
    count = frames or rng.choice([4, 6, 8])
    ((color, shape),) = _items(rng, 1, behind)
    side = rng.uniform(0.2, 0.38) * min(size)
    direction = rng.choice(list(words.DIRECTIONS))
    along = words.DIRECTIONS[direction]
    axis = 0 if along[0] else 1
    room = size[axis] - side - 4
    path = rng.uniform(0.55, 1.0) * room
    start = rng.uniform(0, room - path) + 2
    across = rng.uniform(2, size[1 - axis] - side - 2)
    forward = sum(along) > 0
    picture.frames = []
    drawn = rng.getrandbits(32)
    for index in range(count):
        share = index / (count - 1)
        offset = start + path * (share if forward else 1 - share)
        x, y = (offset, across) if axis == 0 else (across, offset)
        box = (x, y, x + side, y + side)
        frame = still.copy()
        draw_shape(random.Random(drawn), frame, shape, color, box)
        picture.frames.append(frame)
        facts = {"color": color, "shape": shape, "motion": direction}
        picture.things.append(Thing(box, facts | _place_facts(box, size)))
    ask = _Asker(rng, held_out)
    name = shape if rng.random() < 0.7 else f"{color} {shape}"
    ask("motion", "motion", direction, 3, shape=name)
    label = words.article(f"{color} {shape}")
    moving = f"{label} that moves {direction} on {words.article(behind)} background"
    ask("clip_caption", "caption", moving, 0.5)
    ask("clip_color", "color", color, 0.5, shape=shape)
    ask("clip_what", "what", label, 0.5)
    return Scene(picture, ask.questions, label, color, shape)


MAKERS: dict[str, Maker] = {
    "objects": objects,
    "crowd": crowd,
    "text": text,
    "lines": lines,
    "note": note,
    "chart": chart,
    "photo": photo,
    "clip": clip,
}


def make(rng: random.Random, kind: str, size: Size, *, held_out: bool = False) -> Scene:
    """A scene of a kind. In training its picture is worn a little, in the evaluation as drawn."""
    scene = MAKERS[kind](rng, size, held_out)
    if not held_out and kind != "clip":
        scene.picture.frames = [wear(rng, scene.picture.image)]
    return scene
