"""The demo model's training data: fonts, words, scenes and their labels."""

import json
import random
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from server.demo.training import fonts, objects, outside, phrases, vocabulary, words
from server.demo.training.batches import joined
from server.demo.training.curriculum import draw
from server.demo.training.examples import several, single
from server.demo.training.targets import known
from server.demo.training.writing import write

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


def test_hairline_and_variable_faces_are_excluded():
    styles = {face.load(12).getname()[1] for face in FACES}
    assert not [style for style in styles if "Thin" in style or "ExtraLight" in style]
    assert not [face for face in FACES if face.path and "Variable" in face.path.name]


@pytest.mark.parametrize("held_out", [False, True])
def test_font_families_are_equally_likely(held_out):
    rng = random.Random(1)
    families = fonts.faces(held_out=held_out)
    drawn = Counter(fonts.font(rng, 12, held_out=held_out).getname()[0] for _ in range(1500))
    rarest = min(drawn["Amatic SC"], drawn["Roboto"]) if not held_out else min(drawn.values())
    assert rarest > 0.7 * 1500 / len(families)


def test_the_same_seed_gives_the_same_fonts():
    first, second = (
        [fonts.font(rng, size, held_out=False) for size in range(10, 40)]
        for rng in (random.Random(5), random.Random(5))
    )
    assert [font.getname() for font in first] == [font.getname() for font in second]
    assert [font.size for font in first] == list(range(10, 40))
    assert len({font.getname() for font in first}) > 5


def test_the_error_for_a_missing_package_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"\.\[demo-train\]"):
        fonts._files("font_of_nobody", ("*.ttf",))


def test_pictures_held_out_are_never_in_training():
    photos, scenes = outside.PHOTOS, outside.SCENES
    assert len(photos["held out"]) >= 4
    assert len(scenes["held out"]) >= 2
    assert not set(photos["training"]) & set(photos["held out"])
    assert not set(scenes["training"]) & set(scenes["held out"])


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(("width", "height"), [(32, 32), (224, 160), (300, 640)])
def test_outside_pictures_have_contrast_and_repeat_by_seed(held_out, width, height):
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


def test_wordings_held_out_are_never_in_training():
    for wordings in (*phrases.WORDINGS.values(), *phrases.CHAT.values()):
        training = {text.lower() for text in wordings.training}
        assert len(wordings.held_out) >= 4
        assert not training & {text.lower() for text in wordings.held_out}
    assert not set(words.TRAINING_WORDS) & set(words.HELD_OUT_WORDS)


def test_the_shipped_tokenizer_is_the_one_of_the_training_data():
    shipped = Path(vocabulary.__file__).parents[1] / "tokenizer.json"
    assert json.loads(shipped.read_text()) == json.loads(vocabulary.build().to_str())


def test_a_tenth_of_the_written_words_are_training_words():
    rng = random.Random(2)
    contents = [words.content(rng, held_out=False) for _ in range(4000)]
    assert all(1 <= len(text) <= 8 and set(text) <= set(words.CHARACTERS) for text in contents)
    share = sum(text in words.TRAINING_WORDS for text in contents) / len(contents)
    assert 0.07 < share < 0.13


@pytest.mark.parametrize("layout", [objects._ring, objects._strings, objects._rows])
def test_shapes_of_a_crowd_are_inside_the_picture_and_disjoint(layout):
    rng = random.Random(4)
    for _ in range(1500):
        size = rng.choice([(128, 128), (224, 224), (160, 120), (320, 200), (300, 480), (640, 480)])
        count = rng.randint(2, 9)
        boxes = layout(rng, size, count)
        assert len(boxes) == count
        for number, (x0, y0, x1, y1) in enumerate(boxes):
            assert 0 <= x0 < x1 <= size[0]
            assert 0 <= y0 < y1 <= size[1]
            for other in boxes[:number]:
                assert x1 <= other[0] or other[2] <= x0 or y1 <= other[1] or other[3] <= y0


def test_each_shape_of_a_crowd_has_its_rank_at_one_token():
    rng = random.Random(3)
    for _ in range(50):
        picture = single(rng, "crowd", (448, 448)).pictures[0]
        ranks = known(picture, (14, 14))["rank"]
        assert sorted(ranks[ranks > 0]) == list(range(1, len(picture.things) + 1))


def test_counts_of_thirds_add_up_to_the_number_of_shapes():
    rng = random.Random(4)
    for _ in range(50):
        picture = single(rng, "crowd", (288, 384)).pictures[0]
        facts = known(picture, (12, 9))
        across, down = (facts[it].reshape(12, 9) for it in ("column_count", "row_count"))
        assert (across == across[0]).all()
        assert (down == down[:, :1]).all()
        assert across[0, 1::3].sum() == down[1::4, 0].sum() == len(picture.things)


def test_each_character_of_an_answer_is_labelled_at_the_token_before_it():
    codec = vocabulary.Codec(vocabulary.build())
    rng = random.Random(6)
    spelled = Counter()
    for index in range(120):
        kind = ("text", "lines", "note", "chart", "several")[index % 5]
        sizes = [(224, 224)] * (2 if kind == "several" else 1)
        example = several(rng, sizes) if kind == "several" else single(rng, kind, sizes[0])
        example.questions = [it for it in example.questions if it.spelling][:1]
        if not example.questions:
            continue
        (question,) = example.questions
        writer = write(codec, rng, example, [(7, 7)] * len(sizes), 1.0)
        text = question.spelling.text
        ((_, start, end),) = writer.answers
        said = [(place, facts) for place, facts in writer.mentions if start - 1 <= place < end]
        following = [codec.tokenizer.id_to_token(writer.ids[place + 1]) for place, _ in said]
        assert "".join(following) == text
        assert [facts["char"] for _, facts in said] == list(text)
        assert [facts.get("next", "") for _, facts in said] == [*text[1:], ""]
        edges = [(int(facts["x0"]), int(facts["x1"])) for _, facts in said]
        assert edges == sorted(edges)
        spelled[kind] += 1
    assert len(spelled) == 5


@pytest.mark.parametrize("form", [0, 15, 22, 26, 31])  # one, none, a clip, four, no questions
def test_joined_batches_contain_their_parts_unchanged(form):
    codec = vocabulary.Codec(vocabulary.build())
    parts = [
        draw(codec, random.Random(share), random.Random(form), 0.6, 1500.0) for share in range(3)
    ]
    whole = joined(parts)
    row = mention = answer = 0
    for part in parts:
        count, length = part.ids.shape
        rows = slice(row, row + count)
        for name, padding in (("ids", 0), ("branches", -1), ("weights", 0)):
            theirs = getattr(whole, name)[rows]
            assert theirs[:, :length].equal(getattr(part, name))
            assert (theirs[:, length:] == padding).all()
        assert whole.positions[:, rows, :length].equal(part.positions)
        examples, places = whole.mentions[:, mention : mention + part.mentions.shape[1]]
        assert part.ids[tuple(part.mentions)].equal(whole.ids[examples, places])
        assert whole.ids[examples].equal(whole.ids[rows][part.mentions[0]])
        for theirs, ours in zip(whole.answers[answer:], part.answers, strict=False):
            assert theirs == (ours[0] + row, *ours[1:])
        row += count
        mention += part.mentions.shape[1]
        answer += len(part.answers)
    assert (row, mention, answer) == (len(whole.ids), whole.mentions.shape[1], len(whole.answers))
    assert whole.mentioned.equal(torch.cat([part.mentioned for part in parts], 1))
    assert whole.facts.equal(torch.cat([part.facts for part in parts], 1))
    for number, (seen, grid) in enumerate(whole.pictures):
        assert seen.equal(torch.cat([part.pictures[number][0] for part in parts]))
        assert all(part.pictures[number][1] == grid for part in parts)
