"""Scenes of bar charts."""

import random

from server.demo.drawing import Box, Lettering, Size, rgb
from server.demo.training import words
from server.demo.training.fonts import font
from server.demo.training.pictures import Picture, Thing, alike, contrasting, glyphs_of
from server.demo.training.scene import Asker, Mention, Scene, Spelling, blank, caption

_DARK = frozenset({"black", "blue", "purple", "brown", "green", "red"})


def chart(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A bar chart: bars of different colors, most of them with their value above."""
    picture, behind = blank(rng, size, "chart", held_out)
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
    spellings = []
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
            glyphs = glyphs_of(shown, *start, {"owner": color})
            picture.glyphs += glyphs
            spellings.append(Spelling.of(str(value), glyphs, size))
    picture.facts["count"] = str(count)
    ask = Asker(rng, held_out)
    ask("tallest", "tallest", colors[values.index(max(values))], 2)
    ask("shortest", "shortest", colors[values.index(min(values))], 2)
    ask("bars", "bars", str(count), 0.5)
    ask("background", "background", behind, 0.3)
    label = f"a bar chart with {words.NUMBERS[count]} bars"
    ask("chart_caption", "caption", caption([label], behind), 0.4)
    ask("what", "what", "a bar chart", 0.2)
    if printed:
        for color, spelling in zip(colors, spellings, strict=True):
            mention = Mention(color, spelling.facts[0])
            ask("value", "value", spelling.text, 0.6, spelling, color=mention)
    return Scene(picture, ask.questions, "a bar chart")


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
