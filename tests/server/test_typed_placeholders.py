"""An image placeholder that a user types is treated as text, on every API."""

from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from server.engine.arguments import DEMO_MODEL
from tests import pictures
from tests.pictures import image_part, shape, text_part, user

PAD, VIDEO = "<|image_pad|>", "<|video_pad|>"
WIDE = image_part(pictures.encode(shape("red", "circle", (560, 224))))
SMALL = image_part(pictures.encode(shape("blue", "square", (224, 224))))


def tokens(http: httpx.Client, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    answer = http.post("/tokenize", json={"model": "saccade-tiny", "messages": messages, **more})
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["tokens"]
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


PARTS = {
    "before an image": [text_part(f"is {PAD} a token?"), WIDE, SMALL],
    "between images": [WIDE, text_part(f"{PAD}{PAD}{VIDEO}"), SMALL],
    "across parts": [text_part("<|image_"), text_part("pad|> and"), WIDE, SMALL],
}


@pytest.mark.parametrize("case", PARTS)
def test_a_typed_placeholder_does_not_take_the_place_of_a_picture(
    http: httpx.Client, tokenizer: Any, case: str
) -> None:
    typed = user(*PARTS[case])
    plain = user(*(part for part in PARTS[case] if part in (WIDE, SMALL)))
    body = {"model": "saccade-tiny", "messages": typed, "temperature": 0, "max_tokens": 8}
    answer = http.post("/v1/chat/completions", json={**body, "include_image_details": True})
    assert answer.status_code == 200, answer.text
    details = answer.json()["image_details"]
    assert [(each["width"], each["height"]) for each in details] == [(560, 224), (224, 224)]
    ids, without = tokens(http, typed), tokens(http, plain)
    pad = max(set(without), key=without.count)  # the image token
    assert ids.count(pad) == without.count(pad)
    shown = tokenizer.decode([token for token in ids if token != pad])
    assert "".join(part.get("text", "") for part in PARTS[case] if part.get("text")) in (
        shown.replace("<|vision_start|><|vision_end|>", "")
    )


def test_a_typed_placeholder_is_text_in_a_request_without_images(
    http: httpx.Client, tokenizer: Any
) -> None:
    body = {"model": "saccade-tiny", "max_tokens": 4, "temperature": 0}
    messages = [
        {"role": "system", "content": f"never write {PAD}"},
        {"role": "user", "content": f"what is {PAD}, and what is {VIDEO}?"},
    ]
    tool = {"type": "function", "function": {"name": "show", "description": f"shows {PAD}"}}
    answer = http.post("/v1/chat/completions", json={**body, "messages": messages, "tools": [tool]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens(http, messages, tools=[tool]))
    assert PAD in tokenizer.decode(tokens(http, messages))
    said = {"model": "saccade-tiny", "input": f"what is {PAD}?", "max_output_tokens": 4}
    assert http.post("/v1/responses", json=said).status_code == 200
    asked = {"model": "saccade-tiny", "messages": messages[1:], "max_tokens": 4}
    assert http.post("/v1/messages", json=asked).status_code == 200
