"""Large bodies and many streams, for servers and what is between them and their clients."""

import asyncio
import functools
import json
import ssl
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.pictures import encode, image_part, text_part, user
from tests.same_answers import CHAT

_STREAMS = 200
_SIDE = 3600
_PATIENCE_S = 240


@functools.cache
def _large() -> dict[str, Any]:
    """A part with a picture whose file has more than 50 MB in base64."""
    noise = np.random.default_rng(5).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    part = image_part(encode(Image.fromarray(noise), "PNG", compress_level=0))
    assert len(part["image_url"]["url"]) > 50_000_000
    return part


def ask_about_50_mb(http: httpx.Client) -> None:
    """A request with so large a body gets an answer about its picture."""
    messages = user(_large(), text_part("What is in the image?"))
    body = {"model": "saccade-tiny", "messages": messages, "max_tokens": 2}
    answer = http.post(CHAT, json={**body, "include_image_details": True}, timeout=_PATIENCE_S)
    assert answer.status_code == 200, answer.text[:500]
    (detail,) = answer.json()["image_details"]
    assert (detail["width"], detail["height"]) == (_SIDE, _SIDE)


async def run_200_streams(
    url: str, verify: ssl.SSLContext | bool = True, key: str = "none"
) -> None:
    """So many clients get whole streams; none ends before all have begun."""
    limits = httpx.Limits(max_connections=None)
    begun: set[int] = set()
    have_begun = asyncio.Event()
    async with httpx.AsyncClient(
        base_url=url, verify=verify, timeout=_PATIENCE_S, limits=limits
    ) as http:

        async def read(number: int) -> str:
            messages = user(text_part(f"Say {number}"))
            body = {"model": "saccade-tiny", "messages": messages, "stream": True}
            body |= {"max_tokens": 4, "ignore_eos": True}
            headers = {"X-Request-Id": f"stream-{number}", "Authorization": f"Bearer {key}"}
            async with http.stream("POST", CHAT, json=body, headers=headers) as answer:
                assert answer.status_code == 200, await answer.aread()
                lines = answer.aiter_lines()
                first = await anext(lines)
                begun.add(number)
                if len(begun) == _STREAMS:
                    have_begun.set()
                await have_begun.wait()
                return "\n".join([first, *[line async for line in lines]])

        texts = await asyncio.gather(*(read(number) for number in range(_STREAMS)))
    for text in texts:
        events = [line for line in text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "data: [DONE]"
        ends = [
            choice["finish_reason"]
            for event in events
            for choice in json.loads(event.removeprefix("data: "))["choices"]
        ]
        assert ends[-1] == "length"
