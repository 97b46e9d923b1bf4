"""Boxes and points in an answer, in pixels of the original pictures (`include_grounding`)."""

import math
from typing import Any

from saccade_client import grounding
from saccade_client.grounding import Place
from server.request.context import RequestContext
from server.request.grounding import GroundingOptions

# Longer texts are read so far. Reading takes time on the event loop.
_MAX_CHARS = 1 << 17
_DECIMALS = 2


def collect(event: dict[str, Any], request: RequestContext) -> None:
    """Keep the text that an event of a stream, in the form of vLLM's chats or messages, adds."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if isinstance(delta.get("content"), str):
            request.keep_text(choice.get("index", 0), delta["content"])
    delta = event.get("delta")
    if isinstance(delta, dict) and delta.get("type") == "text_delta":
        request.keep_text(0, delta.get("text", ""))


def places(answer: dict[str, Any], request: RequestContext) -> list[dict[str, Any]] | None:
    """`grounding` of an answer, or of the last event of its stream; None of another event."""
    options, texts = request.grounding, _texts(answer, request)
    if options is None or texts is None:
        return None
    return [
        {"choice": choice, "image": options.image, **described}
        for choice, text in sorted(texts.items())
        for place in grounding.find(text[:_MAX_CHARS])
        if (described := _described(place, options, request)) is not None
    ]


def _texts(answer: dict[str, Any], request: RequestContext) -> dict[int, str] | None:
    """The text of each choice, where `answer` has them all."""
    if answer.get("choices"):  # a chat, or a chunk of one that has the running usage
        messages = [choice.get("message") for choice in answer["choices"]]
        if None in messages:
            return None
        return {index: message.get("content") or "" for index, message in enumerate(messages)}
    if isinstance(answer.get("output"), list):  # a response
        contents = [item.get("content") for item in answer["output"] if item["type"] == "message"]
        return {0: _joined([part for content in contents for part in content or ()])}
    if answer.get("type") == "message":
        # Without a reason to stop, it is the beginning of a stream.
        return {0: _joined(answer["content"])} if answer.get("stop_reason") else None
    return request.texts  # the last event of a stream


def _joined(parts: list[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _described(
    place: Place, options: GroundingOptions, request: RequestContext
) -> dict[str, Any] | None:
    """A place, with its numbers as the model wrote them; None if they are too large."""
    scale = place.scale or options.scale
    shown = request.shown[options.image] if options.image < len(request.shown) else None
    numbers: list[float] | None = None
    if shown is not None and shown.region is not None and shown.processed is not None:
        mapped = grounding.mapped(place.numbers, shown.region, shown.processed, scale)
        numbers = [round(number, _DECIMALS) for number in mapped]
    if not all(map(math.isfinite, (*place.numbers, *(numbers or ())))):
        return None
    return {
        "label": place.label,
        ("box" if len(place.numbers) == 4 else "point"): numbers,
        "numbers": list(place.numbers),
        "scale": "pixels" if scale is None else scale,
    }
