"""A refused or cancelled request does not affect the next one, even with images in the cache."""

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests import pictures
from tests.conftest import Server
from tests.pictures import image_part, shape, text_part, user

WHAT = text_part("What is in the image?")


def request(picture: bytes, **more: Any) -> dict[str, Any]:
    messages = user(image_part(picture), WHAT)
    return {"model": "saccade-tiny", "messages": messages, "temperature": 0, **more}


async def ask(client: httpx.AsyncClient, picture: bytes, **more: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=request(picture, **more))


REFUSED: list[dict[str, Any]] = [
    {"logit_bias": {"999999": 1}},
    {"max_tokens": 10_000_000},
    {"top_logprobs": 5000, "logprobs": True},
    {"stop_token_ids": [-1]},
    {"min_tokens": 5, "max_tokens": 2},
    {"structured_outputs": {"regex": "(("}},
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_refused_request_does_not_affect_the_next_one(server: Server, number: int) -> None:
    picture = pictures.encode(shape("red", "circle", (224 + 2 * number, 230)))

    async def test() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for _ in range(2):
                refused = await ask(client, picture, **REFUSED[number])
                assert refused.status_code == 400, refused.text
                good = await ask(client, picture)
                assert good.status_code == 200, good.text
                assert good.json()["choices"][0]["message"]["content"] == "a red circle"

    asyncio.run(test())


async def send_and_cancel(client: httpx.AsyncClient, files: dict[str, bytes], seed: int) -> None:
    """Send requests, cancel most at random moments, and check the answers to the others."""
    chance = random.Random(seed)

    async def one() -> None:
        color = chance.choice(list(files))
        timeout_s = chance.choice([0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 60])
        stream = chance.random() < 0.3
        extra = {"logit_bias": {"999999": 1}} if chance.random() < 0.1 else {}
        try:
            async with asyncio.timeout(timeout_s):
                response = await ask(client, files[color], stream=stream, **extra)
        except TimeoutError:
            return
        if extra:
            return
        assert response.status_code == 200, response.text
        if not stream:
            assert response.json()["choices"][0]["message"]["content"] == f"a {color} circle"

    for _ in range(12):
        await asyncio.gather(*(one() for _ in range(16)))


async def check_after_cancellations(url: str, files: dict[str, bytes], seed: int) -> None:
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await send_and_cancel(client, files, seed)
        for color, picture in files.items():
            response = await ask(client, picture)
            assert response.status_code == 200, response.text
            content = response.json()["choices"][0]["message"]["content"]
            assert content == f"a {color} circle"


def test_random_cancellations_do_not_affect_later_requests(server: Server) -> None:
    sizes = {"red": (260, 260), "green": (1200, 900), "blue": (2400, 1800), "black": (600, 300)}
    files = {color: pictures.encode(shape(color, "circle", s)) for color, s in sizes.items()}
    asyncio.run(check_after_cancellations(server.url, files, 0))


def test_a_cache_too_small_for_the_pictures_fails_no_request(tight: Server) -> None:
    """Every picture evicts another one, and one does not fit at all."""
    sizes = {"red": (560, 560), "green": (728, 560), "blue": (224, 224), "black": (600, 300)}
    files = {color: pictures.encode(shape(color, "circle", s)) for color, s in sizes.items()}
    asyncio.run(check_after_cancellations(tight.url, files, 1))
    with httpx.Client(base_url=tight.url, timeout=60) as client:
        parts = [image_part(files[color]) for color in ("red", "green", "blue", "red")]
        body = {"model": "saccade-tiny", "messages": user(*parts, WHAT), "temperature": 0}
        answers = [client.post("/v1/chat/completions", json=body) for _ in range(3)]
        assert [a.status_code for a in answers] == [200] * 3, answers[0].text
        assert len({a.json()["choices"][0]["message"]["content"] for a in answers}) == 1
        three = client.post("/v1/chat/completions", json={**body, "n": 3, "temperature": 1})
        assert three.status_code == 200, three.text  # each choice is sent with all features
        assert len(three.json()["choices"]) == 3
