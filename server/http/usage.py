"""Completes the usage of an answer: how many tokens its images took, and on request each image.

vLLM writes the answers; this puts `image_tokens` beside its `cached_tokens`, in each of the three
dialects, in bodies and in the events of streams.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import with_length
from server.request import context as requests
from server.request.context import RequestContext, ShownImage

_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
_DATA = b"data: {"


class ImageUsage:
    """Middleware around the routes that answer conversations."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        request = requests.current()
        kind, start, body = b"", None, bytearray()

        async def complete(message: Message) -> None:
            nonlocal kind, start
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                if message["status"] == 200 and kind.startswith(b"application/json"):
                    start = message  # held until the length of the body is known
                    return
            elif start is not None:
                body.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                message = {**message, "body": completed(bytes(body), request)}
                start["headers"] = with_length(start, len(message["body"]))
                await send(start)
            elif kind.startswith(b"text/event-stream"):
                message = {**message, "body": _completed_events(message.get("body", b""), request)}
            await send(message)

        await self._app(scope, receive, complete)


def _completed_events(events: bytes, request: RequestContext) -> bytes:
    if b'"usage":' not in events:
        return events
    lines = events.split(b"\n")
    for index, line in enumerate(lines):
        if line.startswith(_DATA):
            lines[index] = b"data: " + completed(line[len(_DATA) - 1 :], request)
    return b"\n".join(lines)


def completed(body: bytes, request: RequestContext) -> bytes:
    """The JSON object `body` with the images' part of its usage, if it has a usage."""
    if b'"usage":' not in body:
        return body
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    if not isinstance(answer, dict):
        return body
    changed = False
    for holder in (answer, answer.get("response"), answer.get("message")):
        if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
            _complete(holder["usage"], request)
            if request.include_image_details:
                holder["image_details"] = details(request)
            changed = True
    return _dump(answer) if changed else body


def _complete(usage: dict[str, Any], request: RequestContext) -> None:
    image_tokens = sum(image.tokens for image in request.shown)
    if "prompt_tokens" in usage:
        holder = usage["prompt_tokens_details"] = usage.get("prompt_tokens_details") or {}
        if not request.shown:  # vLLM counts what came as embeddings
            image_tokens = (holder.get("multimodal_tokens") or {}).get("image", 0)
    elif "input_tokens_details" in usage:
        holder = usage["input_tokens_details"] = usage.get("input_tokens_details") or {}
    else:
        usage["image_tokens"] = image_tokens
        return
    holder["cached_tokens"] = holder.get("cached_tokens") or 0
    holder["image_tokens"] = image_tokens


def details(request: RequestContext) -> list[dict[str, Any]]:
    """`image_details` of an answer: see `ShownImage` for what they mean.

    `cached` is the furthest stage whose work was there already: "embedding" (the encoder did not
    run), "features" (nor did the processor), or "none".
    """
    encoded = request.encoded or []
    if len(encoded) != len(request.shown):
        encoded = [True] * len(request.shown)
    return [
        {"index": index, **detail(image), "cached": _cached(image, ran)}
        for index, (image, ran) in enumerate(zip(request.shown, encoded, strict=True))
    ]


def _cached(image: ShownImage, encoder_ran: bool) -> str:
    if not encoder_ran:
        return "embedding"
    return "features" if image.cached else "none"


def detail(image: ShownImage) -> dict[str, Any]:
    """Sizes and cost of one image."""
    width, height = image.processed or (None, None)
    return {
        "width": image.size[0],
        "height": image.size[1],
        "processed_width": width,
        "processed_height": height,
        "region": image.region,
        "frame": image.frame,
        "tokens": image.tokens,
    }


def _dump(answer: Any) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
