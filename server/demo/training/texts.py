"""Scenes of text: one text, several lines, notes and receipts."""

import json
import random
from dataclasses import replace

from PIL import ImageDraw

from server.demo.drawing import Box, Lettering, Size, rgb
from server.demo.training import words
from server.demo.training.fonts import font
from server.demo.training.pictures import Picture, Thing, alike, contrasting, glyphs_of
from server.demo.training.scene import Asker, Mention, Scene, Spelling, blank, caption, place_facts

MIN_FONT = 20  # pixels
LARGEST_FONT = 96  # pixels, of most texts
PAGE_FONTS = (20, 72)  # pixels, smallest and largest on a page
FRAME = 5  # pixels from the edge


def _fitting(
    rng: random.Random, texts: list[str], room: Size, held_out: bool, smallest: float
) -> list[Lettering] | None:
    """Texts in one font, each of which fits into `room` by itself; None if they do not fit."""
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
    """One text of 1 to 8 characters; `glyph` is the minimum height of its ink in pixels."""
    picture, behind = blank(rng, size, "text", held_out)
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
    if not held_out and rng.random() < 0.3:
        _rule(rng, picture, behind, box)
    facts = {"color": color, "shape": "text"}
    picture.things.append(Thing(box, facts | place_facts(box, size)))
    picture.glyphs += glyphs_of(line, x, y, {})
    spelling = Spelling.of(content, picture.glyphs, size)
    ask = Asker(rng, held_out)
    ask("read", "read", content, 4, spelling)
    ask("text_color", "color", color, 0.4, shape="text")
    ask("background", "background", behind, 0.3)
    label = f'the text "{content}"'
    ask("what", "what", label, 0.4, spelling)
    ask("text_caption", "caption", caption([f"{label} in {color}"], behind), 0.3, spelling)
    ask("json_text", "json", json.dumps({"text": content}), 0.4, spelling, keys="text")
    return Scene(picture, ask.questions, label, color, "text", spelling)


def _frame(rng: random.Random, picture: Picture, behind: str) -> None:
    """A thin frame near the edge, a layout that training never uses."""
    right, bottom = picture.size[0] - FRAME, picture.size[1] - FRAME
    color = rgb(rng, contrasting(rng, behind))
    ImageDraw.Draw(picture.image).rectangle((FRAME, FRAME, right, bottom), outline=color)


def _rule(rng: random.Random, picture: Picture, behind: str, box: Box) -> None:
    """A straight line beside, above or below the text, of full or random length."""
    axis = rng.randrange(2)  # along which it is moved away from the text
    thick = rng.randint(1, 3)
    length = picture.size[1 - axis]
    start, end = rng.choice([(0, length), sorted(rng.sample(range(length), 2))])
    rooms = (0, int(box[axis]) - 3 - thick), (int(box[axis + 2]) + 3, picture.size[axis] - thick)
    fitting = [room for room in rooms if room[0] <= room[1]]
    if not fitting:
        return
    place = rng.randint(*rng.choice(fitting))
    area = (place, start, place + thick, end) if axis == 0 else (start, place, end, place + thick)
    picture.image.paste(rgb(rng, contrasting(rng, behind)), area)


def lines(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """Two to five lines of one text each."""
    picture, behind = blank(rng, size, "text", held_out)
    count = rng.randint(2, max(2, min(5, size[1] // 40)))
    texts = [words.content(rng, held_out=held_out) for _ in range(count)]
    ask = Asker(rng, held_out)
    for number, shown in _write_lines(rng, picture, behind, texts, texts, held_out):
        begins = shown.facts[0]
        line, digit = Mention(words.ORDINALS[number - 1], begins), Mention(str(number), begins)
        ask("read_line", "read_line", shown.text, 1.0, shown, line=line, number=digit)
    ask("background", "background", behind, 0.2)
    return Scene(picture, ask.questions, "a text")


def _write_lines(
    rng: random.Random,
    picture: Picture,
    behind: str,
    texts: list[str],
    values: list[str],
    held_out: bool,
) -> list[tuple[int, Spelling]]:
    """Writes lines, which end with their values; returns number and value of each that fits."""
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
            picture.glyphs += glyphs_of(Lettering.of(label, letters), x, y, facts)
        owner = {"owner": label.strip(" :").lower()} if label else {}
        start = x + letters.getlength(label)
        shown = Lettering.of(value, letters)
        glyphs = [
            replace(glyph, y=y + line.height / 2)
            for glyph in glyphs_of(shown, start + shown.ink[0], y, facts | owner)
        ]
        picture.glyphs += glyphs
        written.append((number, Spelling.of(value, glyphs, picture.size)))
        y += gap
        if held_out and number < len(made):  # a rule between lines, which training never has
            rule = round(y - (gap - line.height) / 2)
            picture.image.paste(color, (4, rule, width - 4, rule + 1))
    return written


def note(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A note or receipt: lines of a label and a value."""
    picture, behind = blank(rng, size, "note", held_out)
    count = rng.randint(1, max(1, min(5, size[1] // 40)))
    labels = rng.sample(list(words.LABELS), count)
    values = [words.value(rng, words.LABELS[label], held_out=held_out) for label in labels]
    mark = rng.choice(["", ":", ":"])
    texts = [f"{label.upper()}{mark} {value}" for label, value in zip(labels, values, strict=True)]
    ask = Asker(rng, held_out)
    for number, value in _write_lines(rng, picture, behind, texts, values, held_out):
        label = Mention(labels[number - 1], value.facts[0])
        ask("read_label", "read_label", value.text, 1.0, value, label=label)
    ask("background", "background", behind, 0.2)
    return Scene(picture, ask.questions, "a note")


def page(rng: random.Random, size: Size) -> Picture:
    """A picture full of words in all fonts and sizes without questions, to learn glyphs."""
    picture, behind = blank(rng, size, "text", False)
    width, height = size
    y = rng.uniform(2, 12)
    smallest, largest = PAGE_FONTS
    while y < height:
        font_size = int(smallest * (largest / smallest) ** rng.random())
        letters = font(rng, font_size, held_out=False)
        x = rng.uniform(2, 16)
        below = y
        color = contrasting(rng, behind)
        while x < width - letters.size:
            line = Lettering.of(words.content(rng, held_out=False), letters)
            if y + line.height > height - 2:
                return picture
            if x + line.width > width - 2:
                break
            box = line.draw(picture.image, x, y, rgb(rng, color))
            picture.things.append(Thing(box, {"color": color, "shape": "text"}))
            picture.glyphs += glyphs_of(line, x, y, {})
            below = max(below, box[3])
            x += line.width + letters.size * rng.uniform(0.4, 1)
        y = max(below, y + letters.size * 0.3) + rng.uniform(4, 14)
    return picture
