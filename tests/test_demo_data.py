"""What the demo model's training pictures are drawn from: fonts, and pictures of something else."""

import random
import string
from collections import Counter

import numpy as np
import pytest

from server.demo import fonts, outside

FACES = [
    face
    for held_out in (False, True)
    for family in fonts.faces(held_out=held_out).values()
    for face in family
]
PAINTERS = [painter for painters in outside.SCENES.values() for painter in painters]
HELD_OUT = {"Caladea", "Hanken Grotesk", "Manrope"}


def test_held_out_families_are_never_in_training():
    training = fonts.faces(held_out=False)
    assert set(fonts.faces(held_out=True)) == HELD_OUT
    assert len(training) == 11
    assert not HELD_OUT & set(training)
    paths = [face.path for face in FACES]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.path.name if face.path else "Aileron")
def test_every_face_draws_every_character(face):
    loaded = face.load(32)

    def glyph(character):
        mask = loaded.getmask(character)
        return mask.size, bytes(mask)

    missing = glyph("\uffff")
    drawn = {character: glyph(character) for character in fonts.CHARACTERS if character != " "}
    assert [c for c, g in drawn.items() if not any(g[1]) or g == missing] == []
    signs = string.ascii_uppercase + string.digits + ".$:-/"
    assert len({drawn[sign] for sign in signs}) == len(signs)


def test_no_hairline_or_variable_face():
    styles = {face.load(12).getname()[1] for face in FACES}
    assert not [style for style in styles if "Thin" in style or "ExtraLight" in style]
    assert not [face for face in FACES if face.path and "Variable" in face.path.name]


@pytest.mark.parametrize("held_out", [False, True])
def test_families_are_equally_likely(held_out):
    rng = random.Random(1)
    families = fonts.faces(held_out=held_out)
    drawn = Counter(fonts.font(rng, 12, held_out=held_out).getname()[0] for _ in range(1500))
    rarest = min(drawn["Amatic SC"], drawn["Roboto"]) if not held_out else min(drawn.values())
    assert rarest > 0.7 * 1500 / len(families)


def test_a_seed_gives_the_same_fonts():
    first, second = (
        [fonts.font(rng, size, held_out=False) for size in range(10, 40)]
        for rng in (random.Random(5), random.Random(5))
    )
    assert [font.getname() for font in first] == [font.getname() for font in second]
    assert [font.size for font in first] == list(range(10, 40))
    assert len({font.getname() for font in first}) > 5


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"saccade\[demo-train\]"):
        fonts._files("font_of_nobody", ("*.ttf",))


def test_pictures_held_out_are_never_in_training():
    photos, scenes = outside.PHOTOS, outside.SCENES
    assert len(photos["held out"]) >= 4
    assert len(scenes["held out"]) >= 2
    assert not set(photos["training"]) & set(photos["held out"])
    assert not set(scenes["training"]) & set(scenes["held out"])


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(("width", "height"), [(32, 32), (224, 160), (300, 640)])
def test_outside_pictures_are_full_of_detail(held_out, width, height):
    rng, again = random.Random(7), random.Random(7)
    for _ in range(12):
        picture = outside.outside(rng, width, height, held_out=held_out)
        assert (picture.mode, picture.size) == ("RGB", (width, height))
        assert np.asarray(picture).std() > 8
        assert picture == outside.outside(again, width, height, held_out=held_out)
    assert picture != outside.outside(rng, width, height, held_out=held_out)


@pytest.mark.parametrize("painter", PAINTERS, ids=lambda painter: painter.__name__)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 288), (47, 33)])
def test_a_painter_fills_the_picture(painter, height, width):
    picture = painter(np.random.default_rng(3), height, width)
    assert picture.shape == (height, width, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 8
    assert -300 < picture.min() < picture.max() < 600
