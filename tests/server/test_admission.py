"""Admission on the real server: overload, deadlines, and limits of keys."""

import asyncio
import contextlib
import re
import time
from typing import Any

import httpx
import openai
import pytest

from server.engine.vllm_http import ADMIN_PATHS
from server.http.app import ADMITTED
from tests.conftest import Server
from tests.pictures import encode, image_part, shape, text_part, user
from tests.scrape import FRESH
from tests.server.conftest import FEW, SPENT, TWO
from tests.unit.vllm.test_keys import FREE as FREE_OF_VLLM

CHAT = "/v1/chat/completions"


def chat(*parts: dict[str, Any], tokens: int = 4, **more: Any) -> dict[str, Any]:
    parts = parts or (text_part("Describe the picture."),)
    return {
        "model": "saccade-tiny",
        "messages": user(*parts),
        "max_tokens": tokens,
        "ignore_eos": True,
        **more,
    }


def gauges(server: Server, *names: str) -> list[float]:
    text = httpx.get(f"{server.url}/metrics", headers=FRESH, timeout=60).text
    return [float(re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)[1]) for name in names]  # type: ignore[index]


# ---------------------------------------------------------------------- overload


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(tight: Server) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=tight.url, timeout=120) as client:
            return await asyncio.gather(
                *(client.post(CHAT, json=chat(tokens=400)) for _ in range(40))
            )

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code == 503]
    assert 0 < len(refused) <= 20
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in refused:
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("server_busy", "server_error")
        assert "16 requests wait already" in error["message"]
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert gauges(tight, "saccade_requests_running", "saccade_requests_waiting") == [0, 0]


# Routes that need no permit: they change the server or its files, or take no time.
OURS = ("/v1/files", "/v1/batches", "/v1/batches/{batch_id}/cancel")
FREE = {*ADMIN_PATHS, *FREE_OF_VLLM, *OURS}


def test_every_route_that_works_needs_a_permit(server: Server) -> None:
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert {path for path in paths if "post" in paths[path]} - FREE <= set(ADMITTED)


# ---------------------------------------------------------------------- deadlines


def test_work_in_the_engine_ends_at_the_deadline(server: Server) -> None:
    answer = httpx.post(
        server.url + CHAT,
        json=chat(tokens=3000),
        headers={"X-Request-Timeout": "0.5"},
        timeout=60,
    )
    assert answer.status_code == 408, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    deadline = time.monotonic() + 20
    while gauges(server, "vllm:num_requests_running") != [0]:
        assert time.monotonic() < deadline, "the engine still works for the request"
        time.sleep(0.2)


def test_a_stream_in_the_engine_ends_at_the_deadline_with_an_error(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages: Any = user(text_part("Describe the picture."))
    stream = client.chat.completions.create(
        model="saccade-tiny",
        messages=messages,
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"X-Request-Timeout": "1.5"},
    )
    with pytest.raises(openai.APIError, match="was not answered within"):
        for _ in stream:
            pass


# ---------------------------------------------------------------------- limits of keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_over_its_requests_per_minute_gets_a_429(guarded: Server) -> None:
    client = openai.OpenAI(base_url=guarded.url + "/v1", api_key=FEW, max_retries=0)
    messages: Any = user(text_part("Hello"))
    left = []
    for _ in range(3):
        answer = client.chat.completions.with_raw_response.create(
            model="saccade-tiny", messages=messages, max_tokens=1
        )
        left.append(answer.headers["x-ratelimit-remaining-requests"])
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert left == ["2", "1", "0"]
    with pytest.raises(openai.RateLimitError, match="3 requests per minute") as refused:
        client.chat.completions.create(model="saccade-tiny", messages=messages, max_tokens=1)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "rate_limit_error"
    refusal = refused.value.response.headers
    assert 1 <= int(refusal["Retry-After"]) <= 20
    assert refusal["x-ratelimit-remaining-requests"] == "0"


def test_a_key_over_its_limit_gets_anthropics_error_on_its_api(guarded: Server) -> None:
    picture = image_part(encode(shape("red")))
    first = httpx.post(guarded.url + CHAT, json=chat(picture), headers=bearer(SPENT), timeout=60)
    assert first.status_code == 200
    answer = httpx.post(
        guarded.url + "/v1/messages",
        json={"model": "saccade-tiny", "max_tokens": 1, "messages": user(text_part("Hello"))},
        headers=bearer(SPENT),
        timeout=60,
    )
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert "1 image tokens per minute" in answer.json()["error"]["message"]


def test_a_key_over_its_concurrency_gets_a_429_and_then_an_answer(guarded: Server) -> None:
    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=guarded.url, timeout=120) as client:

            async def one() -> int:
                answer = await client.post(CHAT, json=chat(tokens=1000), headers=bearer(TWO))
                return answer.status_code

            return sorted(await asyncio.gather(*(one() for _ in range(4))))

    assert asyncio.run(ask()) == [200, 200, 429, 429]
    again = httpx.post(guarded.url + CHAT, json=chat(), headers=bearer(TWO), timeout=60)
    assert again.status_code == 200


class Busy:
    """Holds all requests that the key TWO may have at a time, until the first refusal."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.refused_at = self.asked_again_at = 0.0
        self.streams = contextlib.ExitStack()

    def __enter__(self) -> "Busy":
        client = self.streams.enter_context(httpx.Client(base_url=self._server.url, timeout=60))
        body = chat(tokens=3000, stream=True)
        for _ in range(2):
            stream = client.stream("POST", CHAT, json=body, headers=bearer(TWO))
            assert self.streams.enter_context(stream).status_code == 200
        return self

    def __exit__(self, *_: object) -> None:
        self.streams.close()

    @property
    def hooks(self) -> Any:
        return {"request": [self._asked], "response": [self._answered]}

    def _asked(self, _: Any) -> None:
        if self.refused_at:
            self.asked_again_at = time.monotonic()

    def _answered(self, response: Any) -> None:
        if not self.refused_at and response.status_code == 429:
            self.refused_at, self.retry_after_s = time.monotonic(), response.headers["Retry-After"]
            self.streams.close()

    @property
    def waited_as_told(self) -> bool:
        return self.asked_again_at - self.refused_at >= int(self.retry_after_s)


def test_openais_client_waits_as_told_and_is_answered(guarded: Server) -> None:
    with Busy(guarded) as busy, openai.DefaultHttpxClient(event_hooks=busy.hooks) as http:
        client = openai.OpenAI(base_url=guarded.url + "/v1", api_key=TWO, http_client=http)
        messages: Any = user(text_part("Hello"))
        answer = client.chat.completions.create(
            model="saccade-tiny", messages=messages, max_tokens=4
        )
        assert answer.choices[0].message.content
        assert busy.waited_as_told
