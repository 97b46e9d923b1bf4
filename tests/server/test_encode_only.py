"""A server that only encodes fills the shared store, and others answer without encoding."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Server, serving
from tests.pictures import encode, image_part, photo, text_part, user
from tests.redis_server import RedisServer, redis_server

# One test compares with the server that other files share.
pytestmark = pytest.mark.group("server")
CHAT = "/v1/chat/completions"
ADMIN = {"Authorization": "Bearer admin"}
PICTURES = [encode(photo((256, 192), seed), "JPEG") for seed in range(300, 310)]
PATIENCE_S = 60


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def encoder(store: RedisServer) -> Iterator[httpx.Client]:
    # The GPU tier has room for six of the pictures.
    small_video = {"count": 1, "num_frames": 2, "width": 64, "height": 64}
    flags = (
        *("--encode-only", "--max-model-len", "4096", "--max-num-batched-tokens", "300"),
        *("--limit-mm-per-prompt", json.dumps({"video": small_video})),
    )
    with (
        serving(*flags, "--embedding-cache-url", store.url, "--admin-key", "admin") as running,
        httpx.Client(base_url=running.url, timeout=PATIENCE_S) as client,
    ):
        yield client


def ask(client: httpx.Client, *pictures: bytes, **options: Any) -> Any:
    parts = (*map(image_part, pictures), text_part("What is it?"))
    body = {
        "model": "saccade-tiny", "messages": user(*parts), "max_tokens": 8, "temperature": 0,
        "logprobs": True, "top_logprobs": 3, "include_image_details": True, **options,
    }  # fmt: skip
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stages(answer: Any) -> list[str]:
    return [image["cached"] for image in answer["image_details"]]


def embeddings(client: httpx.Client) -> Any:
    return client.get("/v1/cache", headers=ADMIN).json()["embeddings"]


def test_another_server_answers_without_encoding(
    store: RedisServer, encoder: httpx.Client, server: Server
) -> None:
    for turn in range(2):
        for picture in PICTURES:
            answer = ask(encoder, picture)
            assert stages(answer) == ["none" if turn == 0 else "embedding"]
            assert answer["choices"][0]["message"]["content"] == ""
            assert answer["usage"]["completion_tokens"] == 0
    assert embeddings(encoder)["host"]["hits"] > 0  # without the language model nothing reads them
    with store.client() as redis:
        deadline = time.monotonic() + PATIENCE_S
        while redis.dbsize() < len(PICTURES):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    flags = ("--max-model-len", "4096", "--embedding-cache-url", store.url, "--admin-key", "admin")
    with (
        serving(*flags, "--embedding-cache-wait-s", str(PATIENCE_S)) as running,
        httpx.Client(base_url=running.url, timeout=PATIENCE_S) as decoder,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as alone,
    ):
        for picture in PICTURES:
            answer = ask(decoder, picture)
            assert stages(answer) == ["embedding"]
            assert answer["choices"] == ask(alone, picture)["choices"]
        found = embeddings(decoder)
        assert found["gpu"]["misses"] == found["shared"]["hits"] == len(PICTURES)


def test_streams_and_texts_end_at_once(encoder: httpx.Client) -> None:
    body = {"model": "saccade-tiny", "messages": user(text_part("Hello")), "stream": True}
    lines = encoder.post(CHAT, json=body).text.splitlines()
    assert "data: [DONE]" in lines
    assert encoder.get("/ready").status_code == 200
