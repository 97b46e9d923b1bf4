"""Boxes and points in the notations of the model families."""

import json
from pathlib import Path
from typing import Any

import pytest

from saccade_client.grounding import MOST_PLACES, Place, find

EXAMPLES = json.loads((Path(__file__).parents[2] / "clients" / "grounding.json").read_text())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["what"])
def test_places_are_found_in_each_notation(example: dict[str, Any]) -> None:
    """The examples are those of the other client too."""
    expected = [
        Place(tuple(place["numbers"]), place.get("label"), place.get("scale"))
        for place in example["places"]
    ]
    assert find(example["text"]) == expected
    assert find(f"{example['text']}\nThen\n{example['text']}") == expected * 2


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
        "(1,2)" + " " * 300_000,
    ],
)
def test_texts_that_only_look_like_notations_have_no_places(text: str) -> None:
    assert find(text) == []


def test_the_number_of_places_is_limited() -> None:
    for text in ("[1,2,3,4]" * 20_000, "<box>" + "1 2 3 4 " * 20_000 + "</box>"):
        assert len(find(text)) == MOST_PLACES
