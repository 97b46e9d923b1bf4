"""Scenes of colored shapes: a few, a crowd, a moving one."""

import json
import math
import random
from dataclasses import dataclass

from server.demo.drawing import COLORS, SHAPES, Box, Size, draw_shape
from server.demo.training import words
from server.demo.training.pictures import Picture, Thing, alike, contrasting, place
from server.demo.training.scene import (
    Asker,
    Mention,
    Scene,
    blank,
    caption,
    cell,
    place_facts,
    position,
    thousandths,
)

MIN_SIDE = 18  # pixels of an object


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

    def facts(self, size: Size) -> dict[str, str]:
        """Its facts in a picture of this size."""
        return {"color": self.color, "shape": self.shape} | place_facts(self.box, size)

    def called(self, name: str, size: Size) -> Mention:
        """A mention of it by this name."""
        return Mention(name, self.facts(size))


def choose_items(rng: random.Random, count: int, behind: str) -> list[tuple[str, str]]:
    """Pairs of color and shape without equal or similar colors and without equal shapes."""
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        color, shape = contrasting(rng, behind), rng.choice(SHAPES)
        if all(not alike(color, other) and shape != name for other, name in chosen):
            chosen.append((color, shape))
        elif rng.random() < 0.05:
            chosen.clear()
    return chosen


def draw_items(
    rng: random.Random, picture: Picture, kinds: list[tuple[str, str]], boxes: list[Box]
) -> list[Item]:
    """Draws objects and returns them from left to right."""
    items = [Item(color, shape, box) for (color, shape), box in zip(kinds, boxes, strict=False)]
    items.sort(key=lambda item: item.center[0])
    for rank, item in enumerate(items, 1):
        draw_shape(rng, picture.image, item.shape, item.color, item.box)
        picture.things.append(Thing(item.box, item.facts(picture.size) | {"rank": str(rank)}))
    picture.facts["count"] = str(len(items))
    return items


def objects(rng: random.Random, size: Size, held_out: bool, count: int | None = None) -> Scene:
    """One to three objects that differ in color and shape."""
    if count is None:
        count = rng.choice([1, 1, 2, 2, 2, 3]) if min(size) >= 120 else rng.choice([1, 1, 2])
    picture, behind = blank(rng, size, "shapes", held_out)
    sides = {1: (0.22, 0.8), 2: (0.18, 0.45), 3: (0.16, 0.36)}[count]
    short = min(size)
    smallest = max(MIN_SIDE, short * sides[0])
    boxes = place(rng, size, count, (smallest, max(smallest, short * sides[1])))
    items = draw_items(rng, picture, choose_items(rng, count, behind), boxes)
    ask = Asker(rng, held_out)
    for item in items:
        _ask_item(ask, item, size, alone=len(items) == 1)
    ask("background", "background", behind, 0.7)
    ask("caption", "caption", caption([item.label for item in items], behind), 2.0)
    ask("count", "count", str(len(items)), 0.4)
    _ask_presence(ask, items, size)
    if len(items) == 1:
        _ask_json(ask, items[0], size, behind)
        ask("what", "what", items[0].label, 1.5)
    else:
        listed = [{"color": item.color, "shape": item.shape} for item in items]
        ask("json_objects", "json", json.dumps({"objects": listed}), 0.4, keys="objects")
        _ask_sides(ask, items, size)
    only = items[0]
    return Scene(picture, ask.questions, only.label, only.color, only.shape)


def _ask_item(ask: Asker, item: Item, size: Size, *, alone: bool) -> None:
    rng = ask.rng
    name = rng.choice([item.name, item.shape])
    if alone and rng.random() < 0.6:
        ask("color", "color_only", item.color)
        ask("shape", "shape_only", item.shape)
        name = rng.choice([name, "object"])
    else:
        ask("color", "color", item.color, shape=item.called(item.shape, size))
        ask("shape", "shape", item.shape, color=item.called(item.color, size))
    box = json.dumps(thousandths(item.box, size))
    ask("box", "box", box, 1.2, object=item.called(rng.choice([item.name, item.shape]), size))
    if found := cell(item.center, size):
        ask("position", "position", position(*found), 1.5, object=item.called(name, size))


def _ask_presence(ask: Asker, items: list[Item], size: Size) -> None:
    """Asks one question whose answer is yes, and one whose answer is no."""
    rng = ask.rng
    one = rng.choice(items)
    name = rng.choice([one.name, one.name, one.shape])
    there = Mention(name, one.facts(size) | {"found": "yes"})
    ask("yes_no", "yes_no", "yes", 1.5, object=there)
    names = {item.name for item in items}
    absent = [shape for shape in SHAPES if all(item.shape != shape for item in items)]
    colors = [color for color in COLORS if not any(alike(color, item.color) for item in items)]
    choices = [f"{one.color} {rng.choice(absent)}", f"{rng.choice(colors)} {one.shape}"]
    choices += [f"{rng.choice(colors)} {rng.choice(absent)}", rng.choice(absent)]
    if len(items) > 1:
        other = rng.choice([item for item in items if item != one])
        choices += [f"{one.color} {other.shape}"] * 2
    name = rng.choice([it for it in choices if it not in names])
    ask("yes_no", "yes_no", "no", 1.5, object=Mention(name, {"found": "no"}))


def _ask_json(ask: Asker, item: Item, size: Size, behind: str) -> None:
    facts = {"color": item.color, "shape": item.shape, "background": behind}
    if found := cell(item.center, size):
        facts["position"] = position(*found)
    keys = ask.rng.sample(list(facts), ask.rng.randint(2, min(3, len(facts))))
    answer = json.dumps({key: facts[key] for key in keys})
    ask("json", "json", answer, keys=words.enumeration(keys))


def _ask_sides(ask: Asker, items: list[Item], size: Size) -> None:
    rng = ask.rng
    for axis, low, high, kind in ((0, "left", "right", "side"), (1, "above", "below", "height")):
        one, other = rng.sample(items, 2)
        apart = (one.center[axis] - other.center[axis]) / size[axis]
        across = (one.center[1 - axis] - other.center[1 - axis]) / size[1 - axis]
        if abs(apart) > 0.12 and (rng.random() < 0.7 or abs(apart) > abs(across)):
            names = {"object": rng.choice([one.name, one.shape]), "other": other.name}
            if rng.random() < 0.5:
                names["other"] = other.shape
            answer = low if apart < 0 else high
            called = one.called(names["object"], size), other.called(names["other"], size)
            ask("side", kind, answer, 4.0, object=called[0], other=called[1])
        ends = (("left", "right"), ("top", "bottom"))[axis]
        ordered = sorted(items, key=lambda item: item.center[axis])
        for side, item, neighbor in (
            (ends[0], ordered[0], ordered[1]),
            (ends[1], ordered[-1], ordered[-2]),
        ):
            if abs(item.center[axis] - neighbor.center[axis]) / size[axis] > 0.12:
                ask("at_side", "at_side", item.label, 0.4, side=side)


def crowd(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """One to nine objects of one kind or several."""
    picture, behind = blank(rng, size, "shapes", held_out)
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
    elif count > 1 and rng.random() < 0.4:
        boxes = rng.choice((_ring, _strings))(rng, size, count)
    else:
        smallest = max(MIN_SIDE, short * 0.1)
        boxes = place(rng, size, count, (smallest, max(smallest, short * rng.uniform(0.15, 0.45))))
    items = draw_items(rng, picture, chosen, boxes)
    count = len(items)
    ask = Asker(rng, held_out)
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
        ask("caption", "caption", caption([label], behind), 1.0)
        facts = {"count": count, "color": only.color, "shape": only.shape}
        keys = rng.sample(list(facts), 2)
        answer = json.dumps({key: facts[key] for key in keys})
        ask("json", "json", answer, 0.5, keys=words.enumeration(keys))
    return Scene(picture, ask.questions, "")


def _rows(rng: random.Random, size: Size, count: int) -> list[Box]:
    """Boxes in slightly irregular rows, a layout that training never uses."""
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


def _ring(rng: random.Random, size: Size, count: int) -> list[Box]:
    """Boxes on an ellipse."""
    radii = [extent * rng.uniform(0.3, 0.4) for extent in size]
    apart = 2 * math.sin(math.pi / max(count, 3)) * min(radii)
    side = max(MIN_SIDE, min(apart * rng.uniform(0.45, 0.65), min(size) * 0.18))
    turned = rng.uniform(0, 2 * math.pi)
    boxes = []
    for index in range(count):
        angle = turned + 2 * math.pi * index / count
        x = size[0] / 2 + radii[0] * math.cos(angle) - side / 2
        y = size[1] / 2 + radii[1] * math.sin(angle) - side / 2
        boxes.append((x, y, x + side, y + side))
    return boxes


def _strings(rng: random.Random, size: Size, count: int) -> list[Box]:
    """Boxes along one, two or three slanted strings, randomly distributed among them."""
    strings = rng.randint(1, 3)
    number = [0] * strings
    for _ in range(count):
        number[rng.randrange(strings)] += 1
    long = 0 if size[0] * rng.uniform(0.6, 1.7) > size[1] else 1
    pitch = size[long] / max(number), size[1 - long] / strings
    if min(pitch) < 1.4 * MIN_SIDE:
        return _ring(rng, size, count)
    side = max(MIN_SIDE, min(pitch) * rng.uniform(0.4, 0.7))
    boxes: list[Box] = []
    for string, members in enumerate(number):
        slant = rng.uniform(-1, 1)
        spread = size[long] / members if members and rng.random() < 0.5 else pitch[0]
        first = rng.uniform(0, size[long] - spread * members)
        for index in range(members):
            along = first + spread * (index + 0.5) - side / 2
            share = (along + side / 2) / size[long] - 0.5
            across = pitch[1] * (string + 0.5 + 0.8 * slant * share) - side * (
                0.5 + 0.8 * slant * share
            )
            x, y = (along, across) if long == 0 else (across, along)
            boxes.append((x, y, x + side, y + side))
    return boxes


def clip(rng: random.Random, size: Size, held_out: bool, frames: int | None = None) -> Scene:
    """A clip of 4 to 8 frames in which an object moves in one direction."""
    picture, behind = blank(rng, size, "shapes", held_out)
    still = picture.image
    count = frames or rng.choice([4, 6, 8])
    ((color, shape),) = choose_items(rng, 1, behind)
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
        picture.things.append(Thing(box, facts | place_facts(box, size), index))
    ask = Asker(rng, held_out)
    name = shape if rng.random() < 0.7 else f"{color} {shape}"
    ask("motion", "motion", direction, 3, shape=name)
    label = words.article(f"{color} {shape}")
    moving = f"{label} that moves {direction} on {words.article(behind)} background"
    ask("clip_caption", "caption", moving, 0.5)
    ask("clip_color", "color", color, 0.5, shape=shape)
    ask("clip_what", "what", label, 0.5)
    return Scene(picture, ask.questions, label, color, shape)


def mosaic(rng: random.Random, size: Size) -> Picture:
    """Many objects of all kinds without questions, to learn colors and shapes."""
    picture, behind = blank(rng, size, "shapes", False)
    short = min(size)
    boxes = place(rng, size, rng.randint(2, 14), (MIN_SIDE, max(MIN_SIDE + 4, 0.4 * short)))
    for box in boxes:
        color, shape = contrasting(rng, behind), rng.choice(SHAPES)
        draw_shape(rng, picture.image, shape, color, box)
        picture.things.append(Thing(box, {"color": color, "shape": shape} | place_facts(box, size)))
    return picture


def traffic(rng: random.Random, size: Size) -> Picture:
    """Two frames of a mosaic whose objects each move in their own direction."""
    picture, _ = blank(rng, size, "shapes", False)
    behind = picture.facts["background"]
    picture.frames.append(picture.image.copy())
    short = min(size)
    boxes = place(rng, size, rng.randint(1, 8), (1.5 * MIN_SIDE, max(1.5 * MIN_SIDE, 0.45 * short)))
    for left, top, right, _ in boxes:
        color, shape = contrasting(rng, behind), rng.choice(SHAPES)
        direction = rng.choice(list(words.DIRECTIONS))
        across, down = words.DIRECTIONS[direction]
        way = rng.uniform(0.12, 0.3) * (right - left)
        side = right - left - way
        x = left + (way if across < 0 else 0) + (0 if across else rng.uniform(0, way))
        y = top + (way if down < 0 else 0) + (0 if down else rng.uniform(0, way))
        drawn = rng.getrandbits(32)
        for frame, image in enumerate(picture.frames):
            moved = x + frame * way * across, y + frame * way * down
            box = (*moved, moved[0] + side, moved[1] + side)
            draw_shape(random.Random(drawn), image, shape, color, box)
            if frame == 0:
                facts = {"color": color, "shape": shape, "motion": direction}
                picture.things.append(Thing(box, facts | place_facts(box, size)))
    return picture
