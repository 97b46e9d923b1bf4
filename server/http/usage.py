"""Adds the tokens of images and videos to the usage of an answer, and on request details of each.

vLLM writes the answers; this adds `image_tokens` and `video_tokens` next to its `cached_tokens`, in
each of the three dialects. The routes call `complete` while they have the answer at hand. Streams
of chats and messages that vLLM has serialised pass a `CompletingStream`, which finds the two events
or so that have a usage. Where the places in an answer are asked for, they come with the usage.
"""

from collections.abc import Awaitable
from typing import Any

import msgspec
from starlette.types import Message, Send

from server.http.grounding import collect, places
from server.imaging.tokens import View
from server.request.context import RequestContext, ShownImage, ShownVideo

_DATA = b"data: {"
_USAGE = b'"usage":'


class CompletingStream:
    """Passes the body of a stream on, and parses only the events that have a usage; all events, if
    places in their text are asked for."""

    def __init__(self, request: RequestContext, send: Send) -> None:
        self._request = request
        self._send = send

    def send(self, message: Message) -> Awaitable[None]:
        body = message.get("body", b"")
        if _USAGE in body or self._request.grounding is not None:
            message = {**message, "body": _completed_events(body, self._request)}
        return self._send(message)


def _completed_events(events: bytes, request: RequestContext) -> bytes:
    lines = events.split(b"\n")
    for index, line in enumerate(lines):
        if line.startswith(_DATA):
            lines[index] = b"data: " + _completed(line[len(_DATA) - 1 :], request)
    return b"\n".join(lines)


def _completed(event: bytes, request: RequestContext) -> bytes:
    """The JSON object `event` with the tokens of images in its usage, if it has one."""
    if _USAGE not in event and request.grounding is None:
        return event
    try:
        content = msgspec.json.decode(event)
    except ValueError:
        return event
    if request.grounding is not None:
        collect(content, request)
    holders = (content, content.get("message"))
    changed = [isinstance(holder, dict) and complete(holder, request) for holder in holders]
    return msgspec.json.encode(content) if any(changed) else event


def complete(answer: dict[str, Any], request: RequestContext) -> bool:
    """Complete `answer`, a JSON object, in place; returns whether it has a usage."""
    if not isinstance(answer.get("usage"), dict):
        return False
    _complete_usage(answer["usage"], request)
    if request.include_image_details:
        answer["image_details"] = details(request)
        if request.shown_videos:
            answer["video_details"] = video_details(request)
    if (found := places(answer, request)) is not None:
        answer["grounding"] = found
    return True


def _complete_usage(usage: dict[str, Any], request: RequestContext) -> None:
    image_tokens = sum(image.tokens for image in request.shown)
    video_tokens = sum(video.tokens for video in request.shown_videos)
    if "prompt_tokens" in usage:
        holder = usage["prompt_tokens_details"] = usage.get("prompt_tokens_details") or {}
        if not request.shown:  # vLLM counts images that were sent as embeddings
            image_tokens = (holder.get("multimodal_tokens") or {}).get("image", 0)
    elif "input_tokens_details" in usage:
        holder = usage["input_tokens_details"] = usage.get("input_tokens_details") or {}
    else:
        usage["image_tokens"] = image_tokens
        if video_tokens:
            usage["video_tokens"] = video_tokens
        return
    holder["cached_tokens"] = holder.get("cached_tokens") or 0
    holder["image_tokens"] = image_tokens
    if video_tokens:
        holder["video_tokens"] = video_tokens


def details(request: RequestContext) -> list[dict[str, Any]]:
    """`image_details` of an answer, one for each image; `ShownImage` explains the values.

    `cached` is the last cached result that the image needed: "embedding" (the encoder did not run),
    "features" (the processor did not run), or "none".
    """
    encoded = _encoded(request)[: len(request.shown)]
    return [
        {"index": index, **detail(image), "cached": _cached(image.cached, ran)}
        for index, (image, ran) in enumerate(zip(request.shown, encoded, strict=True))
    ]


def video_details(request: RequestContext) -> list[dict[str, Any]]:
    """`video_details` of an answer, one for each video; `ShownVideo` explains the values, and
    `details` what `cached` is."""
    encoded = _encoded(request)[len(request.shown) :]
    return [
        {"index": index, **video_detail(video), "cached": _cached(video.cached, ran)}
        for index, (video, ran) in enumerate(zip(request.shown_videos, encoded, strict=True))
    ]


def _encoded(request: RequestContext) -> list[bool]:
    """For which images, and then for which videos, the encoder ran; for all, where that is not
    known."""
    count = len(request.shown) + len(request.shown_videos)
    encoded = request.encoded or []
    return encoded[:count] if len(encoded) >= count else [True] * count


def _cached(features_were: bool, encoder_ran: bool) -> str:
    if not encoder_ran:
        return "embedding"
    return "features" if features_were else "none"


def video_detail(video: ShownVideo) -> dict[str, Any]:
    """Sizes, frames and cost of one video."""
    width, height = video.processed or (None, None)
    return {
        "width": video.size[0],
        "height": video.size[1],
        "processed_width": width,
        "processed_height": height,
        "frames": list(video.frames),
        "times": list(video.times),
        "tokens": video.tokens,
    }


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


def view_detail(view: View) -> dict[str, Any]:
    """What the encoder sees of one image."""
    columns, rows = view.grid or (None, None)
    return {
        "kind": view.kind,
        "region": view.region,
        "width": view.size[0],
        "height": view.size[1],
        "columns": columns,
        "rows": rows,
        "tokens": view.tokens,
    }
