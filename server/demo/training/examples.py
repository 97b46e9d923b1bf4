"""Examples for training and evaluation: pictures with questions."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from server.demo.drawing import COLORS, SHAPES, Size
from server.demo.scoring import OUTSIDE
from server.demo.training import phrases, words
from server.demo.training.charts import chart
from server.demo.training.objects import clip, crowd, objects
from server.demo.training.outside import outside
from server.demo.training.pictures import Picture, wear
from server.demo.training.scene import Asker, Mention, Question, Scene
from server.demo.training.texts import lines, note, text

TASKS = (
    "color",
    "shape",
    "what",
    "background",
    "yes_no",
    "side",
    "tallest",
    "shortest",
    "value",
    "position",
    "caption",
    "pair",
    "count",
    "read",
    "read_label",
    "read_line",
    "box",
    "json",
    "motion",
    "outside",
    "chat",
)

# The kinds of scenes in which the evaluation asks a task; "objects" for all others.
_SCENES = {
    "count": ("crowd",),
    "read": ("text",),
    "read_label": ("note",),
    "read_line": ("lines",),
    "tallest": ("chart",),
    "shortest": ("chart",),
    "value": ("chart",),
    "motion": ("clip",),
    "outside": ("photo",),
    "json": ("objects", "objects", "crowd"),
    "caption": ("objects", "objects", "crowd"),
}
_READ_GLYPH = 24.0  # pixels: minimum height of the text that "read" asks for
_READ_LENGTHS = range(2, 7)


@dataclass(slots=True)
class Example:
    """Pictures (or one clip) and independent questions about them."""

    pictures: list[Picture]
    questions: list[Question]

    @property
    def clip(self) -> bool:
        """Whether it is a video."""
        return any(len(picture.frames) > 1 for picture in self.pictures)


def _photo(rng: random.Random, size: Size, held_out: bool) -> Scene:
    """A picture outside the model's world. Every question about it has the same answer."""
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
        ask("outside", kind, OUTSIDE, weight, **slots)
    return Scene(picture, ask.questions, OUTSIDE)


Maker = Callable[[random.Random, Size, bool], Scene]
_MAKERS: dict[str, Maker] = {
    "objects": objects,
    "crowd": crowd,
    "text": text,
    "lines": lines,
    "note": note,
    "chart": chart,
    "photo": _photo,
    "clip": clip,
}


def _scene(rng: random.Random, kind: str, size: Size, held_out: bool) -> Scene:
    """A scene of a kind. Training pictures are degraded a little, evaluation pictures are not."""
    scene = _MAKERS[kind](rng, size, held_out)
    if not held_out and kind != "clip":
        scene.picture.frames = [wear(rng, scene.picture.image)]
    return scene


def single(
    rng: random.Random,
    kind: str,
    size: Size,
    *,
    held_out: bool = False,
    frames: int | None = None,
) -> Example:
    """One picture, or one clip if the number of `frames` is given."""
    scene = clip(rng, size, held_out, frames) if frames else _scene(rng, kind, size, held_out)
    return Example([scene.picture], scene.questions)


def several(rng: random.Random, sizes: list[Size], *, held_out: bool = False) -> Example:
    """Two to four pictures, each of one object or one short text."""
    scenes = [_one_of_several(rng, size, held_out) for size in sizes]
    if len(scenes) == 2 and rng.random() < 0.35 and scenes[0].shape != "text":
        scenes[1] = _similar(rng, scenes[0], sizes[1], held_out)
    ask = Asker(rng, held_out)
    for number, scene in enumerate(scenes, 1):
        ordinal = words.ORDINALS[number - 1]
        if rng.random() < 0.15 and number == len(scenes):
            ordinal = "last"
        (thing,) = scene.picture.things
        nth = {
            "ordinal": Mention(ordinal, thing.facts),
            "number": Mention(str(number), thing.facts),
        }
        ask("pair", "nth_what", scene.label, 2.0, scene.spelling, **nth)
        if scene.spelling:
            ask("pair", "nth_read", scene.spelling.text, 1.0, scene.spelling, **nth)
        else:
            ask("pair", "nth_color", scene.color, **nth)
            ask("pair", "nth_shape", scene.shape, **nth)
            name = f"{scene.color} {scene.shape}"
            for wanted in (name, scene.shape):
                if sum(wanted in (f"{it.color} {it.shape}", it.shape) for it in scenes) == 1:
                    which = words.ORDINALS[number - 1]
                    named = Mention(wanted, {**thing.facts, "nth": which})
                    ask("pair", "which", f"the {which}", object=named)
    if len(scenes) == 2 and not any(scene.spelling for scene in scenes):
        for aspect in ("color", "shape"):
            same = getattr(scenes[0], aspect) == getattr(scenes[1], aspect)
            ask("pair", "same", "yes" if same else "no", 1.5, aspect=aspect)
            answer = "the same" if same else "different"
            ask("pair", "same_or_different", answer, 1.5, aspect=aspect)
    ask("images", "how_many_images", str(len(scenes)), 0.3)
    return Example([scene.picture for scene in scenes], ask.questions)


def _one_of_several(rng: random.Random, size: Size, held_out: bool) -> Scene:
    if rng.random() < (0.25 if held_out else 0.35):
        return text(rng, size, held_out, 24.0 if held_out else None)
    return objects(rng, size, held_out, 1)


def _similar(rng: random.Random, other: Scene, size: Size, held_out: bool) -> Scene:
    """A scene whose object has the same color, shape or both as another scene's."""
    wanted = rng.choice([(True, True), (True, False), (False, True)])
    while True:
        scene = objects(rng, size, held_out, 1)
        if (scene.color == other.color, scene.shape == other.shape) == wanted:
            return scene


def chat(rng: random.Random, *, held_out: bool = False) -> Example:
    """Questions without a picture."""
    questions = []
    for kind, answer in (
        ("hello", words.HELLO),
        ("abilities", words.ABILITIES),
        ("other", words.UNKNOWN),
    ):
        wordings = phrases.CHAT[kind]
        text = rng.choice(wordings.held_out if held_out else wordings.training)
        questions.append(Question("chat", text, answer))
    return Example([], questions)


def evaluated(rng: random.Random, task: str) -> Example:
    """An example of the evaluation with one question. Its pictures are 224x224 to 640x480."""
    while True:
        example = _held_out(rng, task)
        fitting = [question for question in example.questions if question.task == task]
        if task == "read":
            fitting = [it for it in fitting if len(it.answer) in _READ_LENGTHS]
        if fitting:
            return Example(example.pictures, [rng.choice(fitting)])


def _held_out(rng: random.Random, task: str) -> Example:
    if task == "chat":
        return chat(rng, held_out=True)
    if task == "pair":
        return several(rng, [_size(rng) for _ in range(rng.choice([2, 2, 3, 4]))], held_out=True)
    if task == "read":
        scene = text(rng, _size(rng), True, _READ_GLYPH)
        return Example([scene.picture], scene.questions)
    size = (224, 224) if task == "motion" else _size(rng)
    return single(rng, rng.choice(_SCENES.get(task, ("objects",))), size, held_out=True)


def _size(rng: random.Random) -> Size:
    """224 x 224 half of the time, otherwise up to 640 x 480 or 480 x 640."""
    if rng.random() < 0.5:
        return 224, 224
    return rng.choice([(640, 480), (480, 640), (rng.randint(224, 640), rng.randint(224, 480))])
