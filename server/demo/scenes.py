"""Pictures of the model's world, each with questions and their answers.

A maker takes a source of chance, the size of the picture in pixels and whether it is for the
evaluation (`held_out`: fonts, words, wordings, layouts and backgrounds that training never shows).
"""

import random
from collections.abc import Callable

from server.demo import words
from server.demo.charts import chart
from server.demo.objects import clip, crowd, objects
from server.demo.outside import outside
from server.demo.pictures import COLORS, SHAPES, Picture, wear
from server.demo.scene import Asker, Scene, Size
from server.demo.texts import lines, note, text

Maker = Callable[[random.Random, Size, bool], Scene]


def photo(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A picture outside the model's world, about which anything may be asked."""
    image = outside(rng, *size, held_out=held_out)
    picture = Picture([image], {"kind": "photo"})
    ask = Asker(rng, held_out)
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
