"""Boxes and points of answers, in pixels of the original picture, in all dialects."""

import asyncio
import json
from typing import Any

from server.http.usage import CompletingStream, complete
from server.request.context import RequestContext, ShownImage
from server.request.grounding import GroundingOptions
from server.telemetry.record import Record

TEXT = "a dog at [100, 200, 300, 400]"
PLACE = {
    "choice": 0,
    "image": 0,
    "label": None,
    "box": [200.0, 200.0, 600.0, 400.0],
    "numbers": [100.0, 200.0, 300.0, 400.0],
    "scale": 1000,
}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}


def context(scale: float | None = 1000, image: int = 0, **more: Any) -> RequestContext:
    """A request about a picture of 2000 x 1000 pixels that is processed at 500 x 250."""
    shown = ShownImage((2000, 1000), 8, (500, 250), (0, 0, 2000, 1000), **more)
    options = GroundingOptions(scale, image)
    return RequestContext(Record(), grounding=options, shown=[shown])


def grounding(answer: dict[str, Any], request: RequestContext | None = None) -> Any:
    complete(answer, request or context())
    return answer.get("grounding")


def chat(*texts: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}} for text in texts], "usage": {**USAGE}}


def test_whole_answers_of_each_dialect() -> None:
    assert grounding(chat(TEXT)) == [PLACE]
    assert grounding(chat("none", None, TEXT)) == [{**PLACE, "choice": 2}]
    part = {"type": "output_text", "text": TEXT}
    reasoning = {"type": "reasoning", "content": [{"text": "[1, 2, 3, 4]"}]}
    message = {"type": "message", "content": [part]}
    usage = {"input_tokens": 1, "input_tokens_details": None}
    assert grounding({"output": [reasoning, message], "usage": usage}) == [PLACE]
    message = {"type": "message", "content": [part], "stop_reason": "end_turn", "usage": {}}
    assert grounding(message) == [PLACE]
    assert "grounding" not in (plain := chat(TEXT))
    assert complete(plain, RequestContext(Record()))
    assert "grounding" not in plain


def test_numbers_are_read_by_the_scale_of_the_notation_or_of_the_options() -> None:
    (place,) = grounding(chat("[100, 200, 300, 400]"), context(None))
    assert (place["box"], place["scale"]) == ([400.0, 800.0, 1200.0, 1600.0], "pixels")
    (place,) = grounding(chat('<point x="10" y="50" alt="eye">eye</point>'), context(None))
    assert (place["point"], place["label"], place["scale"]) == ([200.0, 500.0], "eye", 100)


def test_places_without_a_known_picture_keep_their_numbers() -> None:
    (place,) = grounding(chat(TEXT), context(image=4))
    assert (place["box"], place["numbers"], place["image"]) == (None, PLACE["numbers"], 4)


def test_numbers_that_json_cannot_hold_are_left_out() -> None:
    huge = "9" * 400
    assert grounding(chat(f"[{huge}, 2, 3, 4] and [{'9' * 308}, 2, 3, 4]"), context(1e-3)) == []


class Sent:
    def __init__(self) -> None:
        self.events: list[Any] = []

    async def send(self, message: Any) -> None:
        for line in message["body"].decode().split("\n"):
            if line.startswith("data: {"):
                self.events.append(json.loads(line[6:]))


def streamed(*events: dict[str, Any]) -> list[Any]:
    """The events of a stream of vLLM's, as they are sent."""
    sent = Sent()
    stream = CompletingStream(context(), sent.send)

    async def run() -> None:
        for event in events:
            body = f"data: {json.dumps(event)}\n\n".encode()
            await stream.send({"type": "http.response.body", "body": body})

    asyncio.run(run())
    return sent.events


def test_the_last_event_of_a_stream_of_a_chat_has_them() -> None:
    pieces = [
        {"choices": [{"index": 0, "delta": {"content": piece}}], "usage": {**USAGE}}
        for piece in (TEXT[:15], TEXT[15:])
    ]
    *others, last = streamed(*pieces, {"choices": [], "usage": {**USAGE}})
    assert last["grounding"] == [PLACE]
    assert not any("grounding" in event for event in others)


def test_the_last_event_of_a_stream_of_a_message_has_them() -> None:
    start = {"type": "message", "content": [], "stop_reason": None, "usage": {}}
    *others, last = streamed(
        {"type": "message_start", "message": start},
        {
            "type": "content_block_delta",
            "delta": {"type": "thinking_delta", "thinking": "[1,2,3,4]"},
        },
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": TEXT}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}},
    )
    assert last["grounding"] == [PLACE]
    assert not any("grounding" in json.dumps(event) for event in others)
