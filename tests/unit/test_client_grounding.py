"""Boxes and points in the notations of the model families."""

import pytest

from saccade_client.grounding import MOST_PLACES, Place, find


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Qwen2-VL: its model card
        (
            "<|object_ref_start|>the eyes<|object_ref_end|>"
            "<|box_start|>(576,12),(592,27)<|box_end|>",
            [Place((576, 12, 592, 27), "the eyes", 1000)],
        ),
        # Qwen2.5-VL, Qwen3-VL: their cookbooks
        (
            '[\n\t{"point_2d": [394, 105], "label": "a bird"},'
            '\n\t{"bbox_2d": [1, 2, 3, 4], "label": "b"}]',
            [Place((394, 105), "a bird"), Place((1, 2, 3, 4), "b")],
        ),
        # InternVL
        (
            "<ref>dogs</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>",
            [Place((1, 2, 3, 4), "dogs", 1000), Place((5, 6, 7, 8), "dogs", 1000)],
        ),
        # MiniCPM-V
        ("<ref>cup</ref><box>1 2 3 4</box>", [Place((1, 2, 3, 4), "cup", 1000)]),
        # DeepSeek-VL2
        (
            "<|ref|>giraffe<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>",
            [Place((580, 270, 999, 900), "giraffe", 999)],
        ),
        # GLM-4.1V, which also writes other answers between these tokens
        ("<|begin_of_box|>[[1,2,3,4]]<|end_of_box|>", [Place((1, 2, 3, 4), None, 1000)]),
        ("<|begin_of_box|>42<|end_of_box|>", []),
        # Molmo
        (
            '<point x="10.5" y="20.1" alt="its eye">eye</point>',
            [Place((10.5, 20.1), "eye", 100)],
        ),
        (
            '<points x1="1" y1="2.5" x2="3" y2="4" alt="birds">birds</points>',
            [Place((1, 2.5), "birds", 100), Place((3, 4), "birds", 100)],
        ),
        ('<point x="ten" y="2">x</point>', []),
        # PaliGemma
        (
            "<loc0010><loc0020><loc0500><loc1000> cat ; <loc0001><loc0002><loc0003><loc0004> dog",
            [Place((20, 10, 1000, 500), "cat", 1024), Place((2, 1, 4, 3), "dog", 1024)],
        ),
        # Gemma 3 and Gemini
        ('{"box_2d": [10, 20, 30, 40], "label": "x"}', [Place((20, 10, 40, 30), "x", 1000)]),
        # Others
        ("near (10, 20), (30, 40)", [Place((10, 20, 30, 40))]),
        ('{"name": "a", "box": [1.5, 2, 3, 4]}', [Place((1.5, 2, 3, 4), "a")]),
        ("[1, 2, 3], [1, 2, 3, 4, 5] and (1, 2)", []),
    ],
)
def test_places_are_found_in_each_notation(text: str, expected: list[Place]) -> None:
    assert find(text) == expected
    assert find(f"First: {text}\nThen: {text}") == expected * 2


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{" * 50_000 + "[1,2,3,4" * 10_000,
        "<ref>" * 30_000,
        "<box>" + "1 " * 100_000,
        "<point x=" * 30_000,
        "<phrase>a" * 30_000,
        '"bbox_2d":[' * 20_000,
    ],
)
def test_texts_that_only_look_like_notations_have_no_places(text: str) -> None:
    assert find(text) == []


def test_the_number_of_places_is_limited() -> None:
    for text in ("[1,2,3,4]" * 20_000, "<box>" + "1 2 3 4 " * 20_000 + "</box>"):
        assert len(find(text)) == MOST_PLACES
