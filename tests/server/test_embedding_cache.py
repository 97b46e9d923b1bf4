"""The embedding cache in the real server: images are encoded once, and answers stay equal."""

import concurrent.futures
import contextlib
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tests import encoded_videos
from tests.conftest import Server, assert_nothing_is_left, serving
from tests.pictures import TOKEN_PIXELS, data_url, encode, image_part, photo, text_part, user
from tests.redis_server import RedisServer, redis_server
from tests.scrape import FRESH
from tests.server import middlewares

# Some tests compare with the server that other files share.
pytestmark = pytest.mark.group("server")
MODEL = "saccade-tiny"
ADMIN = {"Authorization": "Bearer admin"}


def noise(columns: int, rows: int, seed: int) -> bytes:
    """A picture of `columns` x `rows` tokens."""
    return encode(photo((columns * TOKEN_PIXELS, rows * TOKEN_PIXELS), seed))


# Pictures of 64 tokens, of which the GPU holds 9, and two of 300 tokens, which fill the GPU.
PICTURES = [noise(8, 8, seed) for seed in range(14)]
LARGE, OTHER_LARGE = noise(20, 15, 99), noise(20, 15, 98)
# Long enough that reads do not time out on a busy machine.
PATIENT = ("--embedding-cache-wait-s", "30")
# Else the GPU has room for the largest video.
_SMALL_VIDEO = {"count": 1, "num_frames": 2, "width": 64, "height": 64}
SMALL_GPU = (
    *("--max-num-batched-tokens", "600", "--max-model-len", "4096", "--admin-key", "admin"),
    *("--limit-mm-per-prompt", json.dumps({"video": _SMALL_VIDEO})),
)


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@contextlib.contextmanager
def client_of(*flags: str, **environment: str) -> Iterator[tuple[Server, httpx.Client]]:
    """Start a server, and open a client for it."""
    with (
        serving(*flags, **environment) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield running, client


def tiers(folder: Path | None, store: RedisServer | None, *more: str) -> tuple[str, ...]:
    disk = ("--embedding-cache-dir", str(folder)) if folder else ()
    shared = ("--embedding-cache-url", store.url) if store else ()
    return (*SMALL_GPU, *disk, *shared, *more)


@pytest.fixture(scope="module")
def cached(folder: Path, store: RedisServer) -> Iterator[Server]:
    """A server with all cache tiers, and with middleware of a user."""
    more = ("--middleware", f"{middlewares.__name__}.Passing")
    with serving(*tiers(folder, store), *more) as running:
        yield running


@pytest.fixture
def web(cached: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cached.url, timeout=60) as client:
        client.delete("/v1/cache", headers=ADMIN).raise_for_status()
        wait_for(lambda: counts(client)["disk"]["entries"] == 0)
        yield client


def ask(web: httpx.Client, *pictures: bytes, text: str = "What is it?", **more: Any) -> Any:
    # The text comes first and differs, so that no prefix cache hit skips the encoder.
    parts = (text_part(text), *map(image_part, pictures))
    body = {
        "model": MODEL, "messages": user(*parts), "max_tokens": 4, "temperature": 0,
        "logprobs": True, "top_logprobs": 5, "include_image_details": True, **more,
    }  # fmt: skip
    response = web.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ask_about_clip(web: httpx.Client, text: str) -> Any:
    url = data_url(encoded_videos.video("h264", "mp4", 50, (320, 240)), "video/mp4")
    clip = {"type": "video_url", "video_url": {"url": url, "num_frames": 4}}
    return ask(web, messages=user(text_part(text), clip))


def stages(answer: Any) -> list[str]:
    """The field `cached` of each image."""
    return [image["cached"] for image in answer["image_details"]]


def logprobs(answer: Any) -> Any:
    return answer["choices"][0]["logprobs"]


def counts(web: httpx.Client) -> dict[str, dict[str, Any]]:
    response = web.get("/v1/cache", headers=ADMIN)
    assert response.status_code == 200, response.text
    tiers: dict[str, dict[str, Any]] = response.json()["embeddings"]
    return tiers


def wait_for(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stored_by_all(web: httpx.Client, store: RedisServer, entries: int) -> None:
    """Wait until disk and shared store have this many entries: writes are asynchronous."""
    client = redis.Redis.from_url(store.url)
    wait_for(lambda: counts(web)["disk"]["entries"] >= entries and client.dbsize() >= entries)


def encoder_runs(web: httpx.Client) -> int:
    """How often the encoder ran: GPU misses that no other tier answered."""
    found = counts(web)
    loaded = found["host"]["hits"] + sum(found[t]["hits"] for t in ("disk", "shared") if t in found)
    return int(found["gpu"]["misses"] - loaded)


def test_each_picture_is_encoded_once(web: httpx.Client) -> None:
    before = counts(web)
    for turn in range(3):
        for picture in PICTURES:
            answer = ask(web, picture, text=f"In turn {turn}, what is it?")
            assert stages(answer) == ["none" if turn == 0 else "embedding"]
    after = counts(web)
    assert after["gpu"]["misses"] - before["gpu"]["misses"] == 3 * len(PICTURES)
    assert after["host"]["hits"] - before["host"]["hits"] == 2 * len(PICTURES)
    assert after["gpu"]["tokens"] <= after["gpu"]["max_tokens"] == 600


def test_answers_are_equal_from_every_tier(web: httpx.Client, server: Server) -> None:
    def evict() -> None:
        for large in (LARGE, OTHER_LARGE):
            ask(web, large, text="Between")

    texts = ("a", "b")
    first = [ask(web, PICTURES[0], text=text) for text in texts]
    assert [stages(answer) for answer in first] == [["none"], ["embedding"]]  # on the GPU
    evict()
    before = counts(web)["host"]["hits"]
    from_host = [ask(web, PICTURES[0], text=text + "!") for text in texts]
    assert counts(web)["host"]["hits"] == before + 1
    assert [stages(answer) for answer in from_host] == [["embedding"]] * 2
    with httpx.Client(base_url=server.url, timeout=60) as other:
        for text, answer in zip(texts, first, strict=True):
            assert logprobs(ask(other, PICTURES[0], text=text)) == logprobs(answer)
            again = ask(other, PICTURES[0], text=text + "!")
            assert logprobs(again) == logprobs(from_host[texts.index(text)])


def test_streams_and_multiple_choices_use_the_cache(web: httpx.Client) -> None:
    answer = ask(web, PICTURES[1], PICTURES[2], n=2, temperature=1, seed=1)
    assert stages(answer) == ["none", "none"]
    body = {
        "model": MODEL, "messages": user(text_part("?"), image_part(PICTURES[2])),
        "max_tokens": 2, "stream": True, "include_image_details": True,
    }  # fmt: skip
    response = web.post("/v1/chat/completions", json=body)
    assert response.headers["x-passed"] == "yes"
    events = response.text.split("\n\n")
    last = [json.loads(event[6:]) for event in events if '"usage":' in event][-1]
    assert stages(last) == ["embedding"]
    assert "ec_transfer_params" not in answer or answer["ec_transfer_params"] is None


def test_a_stream_passes_middleware_of_users(web: httpx.Client) -> None:
    body = {
        "model": MODEL, "messages": user(image_part(PICTURES[0]), text_part("?")),
        "max_tokens": 40, "min_tokens": 40, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    whole = web.post("/v1/chat/completions", json=body).raise_for_status().json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with web.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert (answer.status_code, answer.headers["x-passed"]) == (200, "yes")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line[:1] == "d"]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == 40
    assert chunks[-1]["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_metrics_are_labelled_by_tier(web: httpx.Client) -> None:
    for _ in range(2):
        for picture in PICTURES:
            ask(web, picture)

    def found() -> dict[str, set[str]]:
        text = web.get("/metrics", headers=FRESH).text
        return {
            sample.name: {s.labels["tier"] for s in family.samples}
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("saccade_embedding_cache_")
        }

    every = {"gpu", "host", "disk", "shared"}
    names = found()
    for name in ("hits", "misses", "evictions", "errors", "dropped"):
        assert names[f"saccade_embedding_cache_{name}_total"] == every
    assert names["saccade_embedding_cache_bytes"] == {"gpu", "host", "disk"}
    assert names["saccade_embedding_cache_seconds_bucket"] == {"disk", "shared"}


def ask_all(web: httpx.Client) -> list[Any]:
    return [ask(web, picture, text=f"Picture {i}") for i, picture in enumerate(PICTURES)]


@pytest.fixture(scope="module")
def other_model(
    folder: Path, cached: Server, tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> Iterator[httpx.Client]:
    """Another model on a copy of the disk tier, with 16 pages of memory; a picture takes two."""
    model = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(repository / "server" / "demo", model, ignore=shutil.ignore_patterns("*.py"))
    path = model / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_mean": [0.1, 0.1, 0.1]}))
    with httpx.Client(base_url=cached.url, timeout=60) as web:
        ask(web, PICTURES[0])
        wait_for(lambda: counts(web)["disk"]["entries"] >= 1)
    copy = model.with_name("embeddings")  # so that its writes do not affect other tests
    shutil.copytree(folder, copy)
    memory = ("--embedding-cache-gb", str(16 * 65536 / 2**30))
    with client_of(str(model), "--served-model-name", MODEL, *tiers(copy, None), *memory) as (
        _,
        client,
    ):
        yield client


def test_another_model_does_not_reuse_embeddings(
    web: httpx.Client, other_model: httpx.Client
) -> None:
    """An image's key does not depend on the model's files, so the namespace must."""
    first, second = ask(web, PICTURES[0]), ask(other_model, PICTURES[0])
    assert stages(second) == ["none"]
    assert logprobs(second) != logprobs(first)


def test_constant_eviction_does_not_change_answers(other_model: httpx.Client) -> None:
    """The memory tier is too small for the load, so it evicts all the time."""
    alone = [_tokens(logprobs(ask(other_model, p, text="Which?"))) for p in PICTURES]

    def load(number: int) -> None:
        rng = random.Random(number)
        for _ in range(12):
            index = rng.randrange(len(PICTURES))
            together = ask(other_model, PICTURES[index], text="Which?")
            assert _tokens(logprobs(together)) == alone[index]
            ask(other_model, *rng.sample(PICTURES, 3), LARGE, text="Which?")

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(4)))
    found = counts(other_model)["host"]
    assert found["evictions"] > 0
    assert found["bytes"] <= found["max_bytes"] == 16 * 65536


def test_only_admins_can_read_and_clear_the_caches(web: httpx.Client) -> None:
    for method in ("GET", "DELETE"):
        for headers in ({}, {"Authorization": "Bearer other"}):
            response = web.request(method, "/v1/cache", headers=headers)
            assert response.status_code == 403
            assert response.json()["error"]["message"]
    ask(web, PICTURES[0])
    found = web.get("/v1/cache", headers=ADMIN).json()
    assert found["features"]["entries"] == 1
    assert found["features"]["bytes"] > 0
    assert found["embeddings"]["host"]["entries"] == 1
    assert {"entries", "bytes", "max_bytes"} <= found["urls"].keys()
    cleared = web.delete("/v1/cache", headers=ADMIN).json()["cleared"]
    assert {"features", "embeddings.gpu", "embeddings.host", "embeddings.disk"} <= set(cleared)
    assert stages(ask(web, PICTURES[0])) == ["none"]


def test_clearing_the_caches_under_load_fails_no_request(web: httpx.Client) -> None:
    ended = threading.Event()

    def load(number: int) -> int:
        rng, asked = random.Random(number), 0
        while not ended.is_set():
            ask(web, *rng.sample(PICTURES, 2), text=f"{number} {asked}")
            asked += 1
        return asked

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(load, number) for number in range(4)]
        try:
            for _ in range(15):
                assert web.delete("/v1/cache", headers=ADMIN).status_code == 200
                time.sleep(0.2)
        finally:
            ended.set()
        assert all(each.result() for each in loads)


def test_a_failing_shared_store_fails_no_request(
    store: RedisServer, cached: Server, web: httpx.Client
) -> None:
    """The store is paused, then stopped, under load; once it is back, it is used again."""

    def load(number: int) -> list[Any]:
        rng = random.Random(number)
        return [
            logprobs(ask(web, picture, text=f"q{PICTURES.index(picture)}"))
            for picture in rng.sample(PICTURES, len(PICTURES))
        ]

    def in_order(number: int, found: list[Any]) -> list[Any]:
        order = random.Random(number).sample(range(len(PICTURES)), len(PICTURES))
        return [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    expected = in_order(0, load(0))
    for interrupt, restore in ((store.pause, store.resume), (store.stop, store.start)):
        web.delete("/v1/cache", headers=ADMIN)
        interrupt()
        try:
            with concurrent.futures.ThreadPoolExecutor(3) as threads:
                for number, found in enumerate(threads.map(load, range(3))):
                    assert [_tokens(row) for row in in_order(number, found)] == [
                        _tokens(row) for row in expected
                    ]
            assert counts(web)["shared"]["errors"] > 0
        finally:
            restore()
    client = redis.Redis.from_url(store.url)

    def used_again() -> bool:
        web.delete("/v1/cache", headers=ADMIN)
        ask(web, PICTURES[0])
        time.sleep(1)  # writes are asynchronous
        return client.dbsize() > 0

    wait_for(used_again, 120)  # a failed store is not retried for up to 30 s


def _tokens(found: Any) -> list[str]:
    return [token["token"] for token in found["content"]]


def test_clients_cannot_send_embeddings(server: Server) -> None:
    """The engine is configured to receive embeddings, but takes them from its cache only."""
    part = {"type": "image_embeds", "image_embeds": "AAAA"}
    body = {"model": MODEL, "messages": user(part), "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert "enable-mm-embeds" in response.text or "enable_mm_embeds" in response.text


# ------------------------------------------------------- after `cached` was killed


@dataclass
class Killed:
    """The killed server's child processes, and its answers to `ask_all` before."""

    children: list[psutil.Process]
    answers: list[Any]
    of_pictures: list[Path]
    about_clip: Any


@pytest.fixture(scope="module")
def killed(folder: Path, store: RedisServer, cached: Server) -> Killed:
    with httpx.Client(base_url=cached.url, timeout=60) as web:
        web.delete("/v1/cache", headers=ADMIN).raise_for_status()
        answers = ask_all(web)
        stored_by_all(web, store, len(PICTURES))
        of_pictures = sorted(folder.rglob("*.safetensors"))
        about_clip = ask_about_clip(web, "What moves?")
        stored_by_all(web, store, len(PICTURES) + 1)
    children = cached.children()
    assert cached.named("VLLM::EngineCore")
    cached.process.kill()
    return Killed(children, answers, of_pictures, about_clip)


def test_sigkill_leaves_no_child_process(killed: Killed) -> None:
    assert_nothing_is_left(killed.children)


@pytest.fixture(scope="module")
def replica(folder: Path, store: RedisServer, killed: Killed) -> Iterator[httpx.Client]:
    """A server without a memory tier; half of the entries are on disk, and all are in Redis."""
    for path in killed.of_pictures[::2]:
        path.unlink()
    more = ("--encoder-cache-tokens", "5000", "--trust-request-mm-kwargs")
    flags = tiers(folder, store, "--embedding-cache-gb", "0", *PATIENT, *more)
    with client_of(*flags, VLLM_SERVER_DEV_MODE="1") as (_, client):
        yield client


def test_a_replica_loads_every_embedding(replica: httpx.Client, killed: Killed) -> None:
    """It reads one half from disk and the other from the shared store."""
    again = ask_all(replica)
    assert [stages(answer) for answer in again] == [["embedding"]] * len(PICTURES)
    assert list(map(logprobs, again)) == list(map(logprobs, killed.answers))
    found = counts(replica)
    assert found["disk"]["hits"] == found["shared"]["hits"] == len(PICTURES) // 2
    assert encoder_runs(replica) == 0


def test_a_replica_loads_the_embedding_of_a_video(replica: httpx.Client, killed: Killed) -> None:
    assert [clip["cached"] for clip in killed.about_clip["video_details"]] == ["none"]
    before, runs = counts(replica), encoder_runs(replica)
    again = ask_about_clip(replica, "What moves?")
    assert [clip["cached"] for clip in again["video_details"]] == ["embedding"]
    assert logprobs(again) == logprobs(killed.about_clip)
    assert counts(replica)["disk"]["hits"] == before["disk"]["hits"] + 1
    assert encoder_runs(replica) == runs


def test_resetting_the_encoder_cache_closes_the_persistent_tiers(replica: httpx.Client) -> None:
    """After a reset, the weights may differ from the model's files, so stored entries are stale."""
    assert replica.post("/reset_encoder_cache").status_code == 200
    assert stages(ask(replica, PICTURES[0], text="Now?")) == ["features"]
    assert stages(ask(replica, PICTURES[0], text="And now?")) == ["embedding"]
    assert counts(replica).keys() == {"gpu", "host"}


def test_a_picture_larger_than_a_step_is_refused_despite_a_larger_cache(
    replica: httpx.Client,
) -> None:
    """The GPU cache holds 5000 tokens, but one step encodes at most 600."""
    assert counts(replica)["gpu"]["max_tokens"] == 5000
    large = encode(photo((1600, 1200), 1), "JPEG")
    body = {
        "model": MODEL, "messages": user(image_part(large)), "max_tokens": 1,
        "mm_processor_kwargs": {"max_pixels": 4_000_000},
    }  # fmt: skip
    response = replica.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert "encoder cache size 600" in response.text
