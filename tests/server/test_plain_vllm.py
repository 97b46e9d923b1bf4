"""The server's answers equal plain vLLM's over HTTP: tokens, log-probabilities and usage."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from saccade_client import Client, errors
from server.engine.arguments import DEMO_MODEL
from tests import encoded_videos, node, pictures
from tests.conftest import START_TIMEOUT_S, STOP_TIMEOUT_S
from tests.pictures import data_url, image_part, shape, text_part, user, video_part
from tests.starts import template

pytestmark = pytest.mark.group("server")  # all tests compare with this server
RED, BLUE = (pictures.encode(shape(color)) for color in ("red", "blue"))
PHOTO = pictures.encode(pictures.photo((900, 700)), "PNG")
WHAT = text_part("Describe the image.")
H264 = encoded_videos.video("h264", "mp4", 75, (320, 240))
VP9 = encoded_videos.video("vp9", "matroska", 50, (256, 256))
SERIES = [pictures.encode(shape(color), "JPEG") for color in ("red", "blue", "red", "green")]


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx.Client]:
    """Plain vLLM, with the flags that our server sets by default, and those of `server`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (
        *("--model", str(DEMO_MODEL), "--served-model-name", "saccade-tiny"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32"),
        *("--max-model-len", "4096", "--max-num-seqs", "32", "--mm-processor-cache-gb", "1"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    with open(os.devnull, "w") as nowhere:
        outputs = {"output": nowhere.fileno(), "errors": nowhere.fileno()}
        process = template().start("tests.starts:plain_vllm", *flags, **outputs)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _up(client):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def _up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "messages",
    [
        user(image_part(RED), WHAT),
        user(image_part(PHOTO), WHAT),
        user(image_part(RED), text_part("and"), image_part(BLUE), WHAT),
        user(image_part(PHOTO), image_part(PHOTO), WHAT),
        user(image_part(RED, uuid="a"), WHAT),
        user(text_part("hello")),
        [{"role": "system", "content": "be brief"}, *user(WHAT, image_part(BLUE))],
        user(video_part(data_url(H264, "video/mp4")), WHAT),
        user(image_part(BLUE), {**video_part(data_url(VP9, "video/webm")), "uuid": "b"}, WHAT),
        user(video_part(pictures.series_url(*SERIES)), WHAT),
    ],
)
def test_answers_equal_those_of_plain_vllm(
    http: httpx.Client, plain: httpx.Client, messages: Any
) -> None:
    request = {
        "model": "saccade-tiny",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 16,
        "logprobs": True,
        "top_logprobs": 2,
    }
    ours, theirs = (
        client.post("/v1/chat/completions", json=request).raise_for_status().json()
        for client in (http, plain)
    )
    assert ours["choices"] == theirs["choices"]
    shown_by_vllm_on_request = {"prompt_tokens_details"}
    assert all(
        ours["usage"][key] == theirs["usage"][key]
        for key in theirs["usage"].keys() - shown_by_vllm_on_request
    )
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"n": 3, "temperature": 1, "seed": 5, "stream_options": {"include_usage": True}},
        {"stop": ["circle"], "include_stop_str_in_output": True},
        {"stop_token_ids": [4, 9], "min_tokens": 2},
        {"max_tokens": 2},
        {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"return_prompt_text": True},
        {"add_generation_prompt": False, "echo": True},
        {"messages": []},
        {"max_tokens": 10**6},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_streams_equal_those_of_plain_vllm(
    http: httpx.Client, plain: httpx.Client, options: dict[str, Any]
) -> None:
    request = {
        "model": "saccade-tiny",
        "messages": user(image_part(RED), WHAT),
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
        **options,
    }
    (ours, kinds), (theirs, others) = (summary(client, request) for client in (http, plain))
    assert ours == theirs
    # A server that is behind may give all of a text in one event.
    if not (kinds["middle"] and others["middle"]):
        kinds["middle"] = others["middle"] = set()
    assert kinds == others


def summary(client: httpx.Client, request: dict[str, Any]) -> tuple[Any, dict[str, set[Any]]]:
    """What a stream says, however its text is divided into events; and the fields of its first
    events, of its last ones, and of those between."""
    kinds: dict[str, set[Any]] = {"first": set(), "middle": set(), "last": set()}
    response = client.post("/v1/chat/completions", json=request)
    if response.status_code != 200:
        return response.status_code, kinds
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    texts: dict[int, str] = {}
    ends = []
    for chunk in chunks:
        if "error" in chunk:
            return chunk.keys(), kinds
        for choice in chunk["choices"]:
            delta = choice["delta"]
            texts[choice["index"]] = texts.get(choice["index"], "") + (delta.get("content") or "")
            place = "first" if "role" in delta else "last" if choice["finish_reason"] else "middle"
            kinds[place].add((*chunk, *choice, delta.get("role")))
            if choice["finish_reason"] is not None:
                ends.append((choice["index"], choice["finish_reason"], choice["stop_reason"]))
    usage = chunks[-1].get("usage") or {}
    usage.pop("prompt_tokens_details", None)  # vLLM shows it on request only
    return (texts, sorted(ends), usage, chunks[-1].keys()), kinds


def test_every_route_of_plain_vllm_is_served(http: httpx.Client, plain: httpx.Client) -> None:
    ours, theirs = (set(client.get("/openapi.json").json()["paths"]) for client in (http, plain))
    assert theirs - ours == set()


def test_the_client_works_with_plain_vllm(plain: httpx.Client) -> None:
    photo = pictures.encode(pictures.photo((1600, 1200)), "JPEG", quality=90)
    with Client(f"{plain.base_url}/v1") as client:
        seen: list[httpx.Request] = []
        client._http.event_hooks["request"].append(seen.append)
        answer = client.ask("What is in the image?", RED, photo, temperature=0, max_tokens=8)
        assert [(shown.width, shown.height) for shown in answer.images][-1] == (1600, 1200)
        stream = client.stream("What is in the image?", RED, temperature=0)
        assert "".join(stream) == stream.answer.text == "a red circle"
        with pytest.raises(errors.NotFound):
            client.ask("?", model="none")
    paths = [request.url.path for request in seen]
    assert set(paths) == {"/version", "/v1/models", "/v1/chat/completions"}
    assert pictures.data_url(photo, "image/jpeg").encode() in seen[-3].read()


def test_the_typescript_client_works_with_plain_vllm(plain: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    photo = pictures.encode(pictures.photo((1600, 1200)), "JPEG", quality=90)
    (tmp_path / "photo.jpg").write_bytes(photo)
    address = str(plain.base_url).rstrip("/")
    environment = {"SACCADE_URL": address, "SACCADE_PICTURES": str(tmp_path)}
    node.run(["--test", node.built_client() / "test" / "plain.test.ts"], **environment)
