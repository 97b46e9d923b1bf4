"""API key groups on the real server: no group can see or corrupt the cached work of another."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import pictures
from tests.conftest import Server
from tests.pictures import image_part, shape, text_part, user
from tests.process_memory import memory_with
from tests.scrape import FRESH
from tests.server.conftest import A2, ADMIN, FLAG, KEYS, A, B

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
WHAT = text_part("What is in the image?")


@pytest.fixture(scope="module")
def web(guarded: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def body(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "saccade-tiny",
        "messages": user(*parts),
        "temperature": 0,
        "include_image_details": True,
        **more,
    }


def post(web: httpx.Client, key: str, document: Any, path: str = "/v1/chat/completions") -> Any:
    response = web.post(path, json=document, headers=bearer(key))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def prefix_hit(answer: Any) -> bool:
    return bool(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def image_hit(answer: Any) -> bool:
    (image,) = answer["image_details"]
    return bool(image["cached"] != "none")


def lookups(web: httpx.Client) -> dict[str, float]:
    found = re.findall(
        r'saccade_image_lookups_total\{result="(\w+)"\} (\S+)',
        web.get("/metrics", headers=FRESH).text,
    )
    return {"hit": 0.0, "miss": 0.0} | {result: float(count) for result, count in found}


# ---------------------------------------------------------------------- authentication


@pytest.mark.parametrize("headers", [{}, bearer("sk-unknown"), {"Authorization": f"Basic {A}"}])
def test_every_guarded_route_refuses_a_missing_or_invalid_key(
    web: httpx.Client, headers: dict[str, str]
) -> None:
    routes = [
        (method, re.sub(r"\{\w+\}", "x", path))
        for path, methods in web.get("/openapi.json").json()["paths"].items()
        for method in methods
        if path.startswith(GUARDED)
    ]
    assert ("post", "/v1/chat/completions") in routes
    assert ("post", "/v1/messages") in routes
    assert ("post", "/v1/images/tokens") in routes
    for method, path in routes:
        response = web.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert A not in response.text


def test_open_routes_need_no_key(web: httpx.Client) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert web.get(path).status_code == 200


@pytest.mark.parametrize("key", [A, A2, B, ADMIN, FLAG])
def test_every_known_key_is_accepted(web: httpx.Client, key: str) -> None:
    assert web.get("/v1/models", headers=bearer(key)).status_code == 200
    assert text_of(post(web, key, body(image_part(pictures.encode(shape("red"))), WHAT))) == (
        "a red circle"
    )


def test_a_cors_preflight_needs_no_key(web: httpx.Client) -> None:
    """Browsers send preflight requests without keys. Any answer but a 401 is fine."""
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    assert web.options("/v1/chat/completions", headers=headers).status_code != 401


# ---------------------------------------------------------------------- uuids and hashes


def test_an_image_uuid_is_scoped_to_its_group(web: httpx.Client) -> None:
    red, blue = (pictures.encode(shape(color)) for color in ("red", "blue"))
    named = body({"type": "image_url", "image_url": None, "uuid": "logo"}, WHAT)

    def unknown(key: str) -> bool:
        response = web.post("/v1/chat/completions", json=named, headers=bearer(key))
        return response.status_code == 400 and response.json()["error"]["code"] == "unknown_image"

    post(web, A, body(image_part(red, uuid="logo"), WHAT))
    assert unknown(B)
    assert unknown(FLAG)
    assert text_of(post(web, A2, named)) == "a red circle"
    post(web, B, body(image_part(blue, uuid="logo"), WHAT))
    assert text_of(post(web, B, named)) == "a blue circle"
    assert text_of(post(web, A, named)) == "a red circle"


def video(color: str, uuid: str) -> dict[str, Any]:
    """A video of two equal frames."""
    frame = pictures.data_url(pictures.encode(shape(color), "JPEG")).partition(",")[2]
    url = f"data:video/jpeg;base64,{frame},{frame}"
    return {"type": "video_url", "video_url": {"url": url}, "uuid": uuid}


def test_a_video_uuid_is_scoped_to_its_group(web: httpx.Client) -> None:
    named = {"type": "video_url", "video_url": None, "uuid": "clip"}

    def answer(key: str, part: Any) -> str:
        return text_of(post(web, key, body(part, WHAT, max_tokens=4)))

    red = answer(A, video("red", "clip"))
    for key in (B, FLAG):
        response = web.post("/v1/chat/completions", json=body(named, WHAT), headers=bearer(key))
        assert response.json()["error"]["code"] == "unknown_image"
    blue = answer(B, video("blue", "clip"))
    assert red != blue
    assert answer(A2, named) == red
    assert answer(B, named) == blue
    assert answer(A, video("blue", "clip")) == blue  # it is the key of no cache


def test_a_rendered_video_uuid_is_scoped_to_its_group(web: httpx.Client) -> None:
    """Rendering has its own cache and returns its contents to clients."""

    def features(key: str, color: str) -> tuple[Any, Any]:
        document = body(video(color, "film"), WHAT)
        found = post(web, key, document, "/v1/chat/completions/render")["features"]
        return found["kwargs_data"], found["mm_hashes"]

    (red, red_key), (blue, blue_key) = features(A, "red"), features(B, "blue")
    assert red != blue
    assert features(A2, "red") == (red, red_key)
    same, other_key = features(A, "blue")
    assert same == blue
    assert other_key != blue_key


def test_features_sent_under_another_groups_hash_do_not_reach_that_group(web: httpx.Client) -> None:
    """B sends its own features under the hash that A's picture will have."""
    victim, poison = (pictures.encode(shape(color)) for color in ("green", "yellow"))
    render = "/v1/chat/completions/render"
    name = post(web, A, body(image_part(victim), WHAT), render)["features"]["mm_hashes"]
    poisoned = post(web, B, body(image_part(poison), WHAT), render)
    assert poisoned["features"]["mm_hashes"] != name
    poisoned["features"]["mm_hashes"] = name
    post(web, B, poisoned, "/inference/v1/generate")
    assert text_of(post(web, A, body(image_part(victim), WHAT))) == "a green circle"


def test_features_of_another_group_cannot_be_used_by_their_hash(web: httpx.Client) -> None:
    render = "/v1/chat/completions/render"
    asked = body(image_part(pictures.encode(shape("green", "square"))), WHAT)
    rendered = post(web, A, asked, render)
    post(web, A, asked)  # the engine has the features of A now
    rendered["features"] |= {"kwargs_data": None, "mm_metadata": None}
    generate = "/inference/v1/generate"
    own = web.post(generate, json=rendered, headers=bearer(A))
    other = web.post(generate, json=rendered, headers=bearer(B))
    assert own.status_code == 200, own.text
    assert other.status_code != 200


# ---------------------------------------------------------------------- cached content


def long_question(color: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture, and a text that fills some blocks of the prefix cache."""
    picture = image_part(pictures.encode(shape(color, "square", (448, 448))))
    return picture, text_part("What is in the image? " * 60)


@pytest.mark.parametrize("stream", [False, True])
def test_cache_hits_do_not_reveal_another_groups_requests(web: httpx.Client, stream: bool) -> None:
    question = long_question("red" if stream else "blue")

    def hits(key: str) -> tuple[bool, bool]:
        if not stream:
            answer = post(web, key, body(*question))
            return image_hit(answer), prefix_hit(answer)
        document = body(*question, stream=True, stream_options={"include_usage": True})
        text = web.post("/v1/chat/completions", json=document, headers=bearer(key)).text
        (last,) = (json.loads(line[6:]) for line in text.splitlines() if '"usage":{' in line)
        return image_hit(last), prefix_hit(last)

    before = lookups(web)
    assert hits(A) == (False, False)
    assert hits(B) == (False, False)
    assert hits(FLAG) == (False, False)
    middle = lookups(web)
    assert (middle["hit"] - before["hit"], middle["miss"] - before["miss"]) == (0, 3)
    assert hits(A2) == (True, True)
    assert hits(B) == (True, True)
    after = lookups(web)
    assert (after["hit"] - middle["hit"], after["miss"] - middle["miss"]) == (2, 0)


def test_texts_are_cached_per_group_and_cache_salt(web: httpx.Client) -> None:
    text = text_part("Tell me about circles and squares. " * 60)

    def hit(key: str, **more: Any) -> bool:
        return prefix_hit(post(web, key, body(text, max_tokens=2, **more)))

    assert not hit(A)
    assert not hit(B)
    assert not hit(A, cache_salt="x")
    assert not hit(B, cache_salt="x")
    assert not hit(A, cache_salt="y")
    assert hit(A2)
    assert hit(A2, cache_salt="x", n=2, temperature=1)
    assert hit(B, cache_salt="x")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/completions"])
def test_every_api_keeps_the_prefix_caches_of_groups_apart(web: httpx.Client, path: str) -> None:
    text = f"Tell me about {path}. " * 100
    documents: dict[str, dict[str, Any]] = {
        "/v1/responses": {"input": text, "max_output_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 2},
        "/v1/completions": {"prompt": text, "max_tokens": 2},
    }

    def cached(key: str) -> int:
        usage = post(web, key, {"model": "saccade-tiny", **documents[path]}, path)["usage"]
        holders = (usage, *(v for v in usage.values() if isinstance(v, dict)))
        names = ("cached_tokens", "cache_read_input_tokens")
        return sum(holder.get(name) or 0 for holder in holders for name in names)

    assert cached(A) == 0
    assert cached(B) == 0
    assert cached(A2) > 0


def test_concurrent_decodes_are_not_shared_between_groups(guarded: Server) -> None:
    """If groups send equal pictures at the same time, each group's is decoded separately."""
    large = pictures.encode(pictures.photo((2000, 1500), seed=7))

    def decoded(metrics: str) -> float:
        found = re.search(r"saccade_image_decode_seconds_count (\S+)", metrics)
        assert found
        return float(found[1])

    async def test() -> float:
        async with httpx.AsyncClient(base_url=guarded.url, timeout=60) as web:
            before = decoded((await web.get("/metrics", headers=FRESH)).text)
            document = body(image_part(large), WHAT, max_tokens=1)
            asked = [
                web.post("/v1/chat/completions", json=document, headers=bearer(key))
                for key in (A, B, FLAG)
            ]
            for response in await asyncio.gather(*asked):
                assert response.status_code == 200, response.text
            return decoded((await web.get("/metrics", headers=FRESH)).text) - before

    assert asyncio.run(test()) == 3


# ---------------------------------------------------------------------- the keys file, and secrets


def status_becomes(web: httpx.Client, key: str, status: int) -> bool:
    deadline = time.monotonic() + 30
    while web.get("/v1/models", headers=bearer(key)).status_code != status:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_changes_of_the_keys_file_take_effect(
    guarded: Server, web: httpx.Client, keys_file: Path
) -> None:
    new = "sk-secret-that-is-new"
    question = body(text_part("Is the work of a group still there? " * 40), max_tokens=1)
    post(web, A, question)
    try:
        keys_file.write_text(json.dumps({"groups": {"team-a": [new]}}))
        assert status_becomes(web, new, 200)
        assert status_becomes(web, B, 401)
        assert web.get("/v1/models", headers=bearer(FLAG)).status_code == 200
        assert prefix_hit(post(web, new, question))  # another key, the same group
        keys_file.write_text('{"groups": {"team-b": ["sk-secret-in-a-broken-file"')
        deadline = time.monotonic() + 30
        while not any("the old keys stay" in line for line in guarded.log):
            assert time.monotonic() < deadline
            assert web.get("/v1/models", headers=bearer(new)).status_code == 200
            time.sleep(0.1)
    finally:
        keys_file.write_text(json.dumps(KEYS))
    assert status_becomes(web, B, 200)
    assert status_becomes(web, new, 401)


def test_no_process_that_decodes_contains_a_key(guarded: Server, web: httpx.Client) -> None:
    web.post("/v1/chat/completions", content=b"{", headers=bearer(FLAG))
    marks = [A, B, ADMIN, FLAG]
    workers = guarded.image_workers()
    forkserver = workers[0].parent()
    assert forkserver is not None
    for process in (forkserver, *workers):
        assert list(memory_with(process.pid, marks)) == []
    assert FLAG in memory_with(guarded.process.pid, marks)


def test_workers_are_sandboxed(guarded: Server, web: httpx.Client) -> None:
    text = web.get("/metrics", headers=FRESH).text
    for layer in ("seccomp", "landlock"):
        assert f'saccade_image_worker_sandbox{{layer="{layer}"}} 1.0' in text
    for worker in guarded.image_workers():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)  # a filter
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)


def test_no_key_is_logged(guarded: Server, web: httpx.Client) -> None:
    """The last test here, so that the log covers the refused requests above."""
    web.post("/v1/chat/completions", content=b"{", headers=bearer(A))
    assert web.get("/v1/models", headers=bearer(A)).status_code == 200
    log = "".join(guarded.log)
    assert "/v1/models" in log  # the log covers these requests
    assert "secret" not in log
