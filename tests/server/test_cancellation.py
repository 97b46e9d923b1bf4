"""Clients that leave at each stage, and bounds of the whole server."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.conftest import STOP_TIMEOUT_S, Origin, Server, assert_nothing_is_left
from tests.pictures import data_url, encode, photo, text_part, user
from tests.scrape import Series, ended_early, rises, scrape, value, wait_for

CHAT = "/v1/chat/completions"
CANCELLED = "saccade_cancellations_total"
WHAT = text_part("What is it?")


@pytest.fixture
def http(scarce: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scarce.url, timeout=120) as client:
        wait_for(client, is_idle, 60)
        yield client
        wait_for(client, is_idle, 60)


def is_idle(now: Series) -> bool:
    """Whether no request has a permit, waits for one, or is in the engine, and none holds
    anything."""
    counts = [value(now, name) for name in ("saccade_requests_running", "saccade_requests_waiting")]
    counts += [
        count
        for (name, _), count in now.items()
        if name in ("saccade_admission_held", "vllm:num_requests_running")
        or name == "vllm:num_requests_waiting"
    ]
    return not any(counts)


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "saccade-tiny", "messages": user(*parts, WHAT), "max_tokens": 4, **more}


def capped(data: bytes, tokens: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), "max_tokens": tokens}}


def at(origin: Origin, path: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": origin.url + path}}


@contextlib.contextmanager
def sent(server: Server, body: dict[str, Any], *, less: int = 0) -> Iterator[socket.socket]:
    """A client that has sent a request, but for its last `less` bytes, and leaves at the end."""
    data, host = json.dumps(body).encode(), urlsplit(server.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host.hostname, host.port)) as client:
        head += f"Content-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data[: len(data) - less])
        yield client


@contextlib.contextmanager
def two_in_the_engine(
    server: Server, http: httpx.Client, *parts: dict[str, Any]
) -> Iterator[contextlib.ExitStack]:
    """Two requests have the permits, and the engine is suspended. The clients stay as long as the
    stack that is given."""
    with server.engine_held(), contextlib.ExitStack() as clients:
        for _ in range(2):
            clients.enter_context(sent(server, chat(*parts)))
        wait_for(http, lambda now: value(now, "saccade_requests_running") == 2)
        yield clients


# ---------------------------------------------------------------------- clients that leave


def test_during_the_upload(scarce: Server, http: httpx.Client) -> None:
    before = scrape(http)
    with sent(scarce, chat(), less=10):
        wait_for(http, lambda now: value(now, "saccade_requests_in_flight") == 1)
    rises(http, before, CANCELLED, stage="upload")


def test_while_waiting_for_a_permit_and_in_the_engine(
    scarce: Server, http: httpx.Client, origin: Origin
) -> None:
    before = scrape(http)
    with two_in_the_engine(scarce, http) as clients:
        with sent(scarce, chat(at(origin, "/never.png"))):
            wait_for(http, lambda now: value(now, "saccade_requests_waiting") == 1)
        rises(http, before, CANCELLED, stage="admission")
        clients.close()
        rises(http, before, CANCELLED, 2, stage="engine_queue")
        wait_for(http, lambda now: value(now, "saccade_requests_running") == 0)
    assert origin.requests == []


def test_during_a_fetch(scarce: Server, http: httpx.Client, origin: Origin) -> None:
    origin.files["/slow.png"], origin.delay_s["/slow.png"] = encode(photo((64, 64))), 6.0
    before = scrape(http)
    with sent(scarce, chat(at(origin, "/slow.png"))):
        while not origin.requests:
            time.sleep(0.01)
    rises(http, before, CANCELLED, stage="fetch")
    time.sleep(6.5)  # the picture would be there now
    now = scrape(http)
    assert value(now, "saccade_image_lookups_total", result="miss") == value(
        before, "saccade_image_lookups_total", result="miss"
    )


def test_in_the_queue_of_the_workers_and_while_a_worker_decodes(
    scarce: Server, http: httpx.Client
) -> None:
    first, second = (capped(encode(photo((900, 900), seed)), 40) for seed in (3, 4))
    before, workers = scrape(http), scarce.image_workers()
    for worker in workers:
        worker.suspend()  # it does not end its picture by itself
    with sent(scarce, chat(first)):
        wait_for(http, lambda now: value(now, "saccade_image_workers_busy") == 1)
        with sent(scarce, chat(second)):
            wait_for(http, lambda now: value(now, "saccade_image_queue") == 1)
        rises(http, before, CANCELLED, stage="image_queue")
    rises(http, before, CANCELLED, stage="decode")
    now = rises(http, before, "saccade_image_worker_restarts_total")  # it did not decode to the end
    wait_for(http, lambda now: value(now, "saccade_image_workers_up") == 1)
    assert not any(worker.is_running() for worker in workers)
    deaths = "saccade_image_worker_deaths_total"
    assert value(now, deaths) == value(before, deaths)
    assert http.post(CHAT, json=chat(capped(encode(photo((90, 90))), 40))).status_code == 200


def left_in(http: httpx.Client, before: Series) -> str | None:
    """Wait for the end of a request; returns the stage in which its client left, if it did."""

    def over(now: Series) -> str | None:
        for (name, labels), count in now.items():
            if name == CANCELLED and count > before[name, labels]:
                return dict(labels)["stage"]
        answered = value(now, "saccade_requests_total", outcome="answered")
        is_over = answered > value(before, "saccade_requests_total", outcome="answered")
        return "" if is_over else None

    return over(wait_for(http, lambda now: over(now) is not None, 60)) or None


def engine_tokens(now: Series) -> float:
    """How many tokens the engine has read and written."""
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    return sum(count for (name, _), count in now.items() if name in names)


def test_during_the_prefill(scarce: Server, http: httpx.Client) -> None:
    stage, seed = None, 0
    while stage != "prefill":  # on a slow machine, the answer may begin first
        seed += 1
        picture = capped(encode(photo((300, 300), seed)), 60)
        before = scrape(http)
        with sent(
            scarce, chat(picture, text_part(3000 * "word "), max_tokens=500, ignore_eos=True)
        ) as client:
            wait_for(http, lambda now: in_engine(now) == 1, pause_s=0)
            with scarce.engine_held():
                time.sleep(1)  # by then, the server knows that the encoder ran
                client.close()
                stage = left_in(http, before)
                wait_for(http, lambda now: value(now, "saccade_requests_running") == 0)
        now = wait_for(http, is_idle)
    assert engine_tokens(now) == engine_tokens(before)  # it was aborted


def in_engine(now: Series) -> float:
    return sum(count for (name, _), count in now.items() if name == "vllm:num_requests_running")


def test_during_a_stream(scarce: Server, http: httpx.Client) -> None:
    noticed = False
    while not noticed:  # on a slow machine, the answer may end first
        before = scrape(http)
        with sent(scarce, chat(stream=True, max_tokens=3000, ignore_eos=True)) as client:
            read = b""
            while b"data: " not in read:
                read += client.recv(4096)
        noticed = ended_early(http, before)


def test_a_deadline_cancels_a_fetch(scarce: Server, http: httpx.Client, origin: Origin) -> None:
    origin.files["/late.png"], origin.delay_s["/late.png"] = encode(photo((64, 64))), 5.0
    answer = http.post(CHAT, json=chat(at(origin, "/late.png")), headers={"X-Request-Timeout": "1"})
    assert answer.status_code == 408
    error = answer.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert "stage fetch" in error["message"]


# ---------------------------------------------------------------------- bounds


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 503, answer.text
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_a_request_that_the_engine_would_refuse_is_refused_before_any_work(
    scarce: Server, http: httpx.Client, origin: Origin
) -> None:
    with scarce.engine_held(), sent(scarce, chat(n=4, temperature=1)):
        wait_for(http, lambda now: value(now, "saccade_requests_running") == 1)
        error = refusal(http.post(CHAT, json=chat(at(origin, "/never.png"), n=3)))
    assert error["code"] == "engine_queue_full"
    assert "4 requests run or wait in the engine, the limit is 6" in error["message"]
    assert origin.requests == []


def test_a_request_that_the_engine_would_always_refuse_is_invalid(
    http: httpx.Client, origin: Origin
) -> None:
    answer = http.post(CHAT, json=chat(at(origin, "/never.png"), n=7))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "too_many_answers")
    assert "7 answers, the limit is 6" in error["message"]
    assert origin.requests == []
    assert http.post(CHAT, json=chat(n=6, temperature=1)).status_code == 200


def test_requests_wait_for_image_tokens_and_are_refused_when_the_queue_is_full(
    scarce: Server, http: httpx.Client
) -> None:
    pictures = [capped(encode(photo((800, 800), seed)), 60) for seed in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with scarce.engine_held():
            asked = []
            for count, picture in enumerate(pictures, 1):
                asked.append(threads.submit(http.post, CHAT, json=chat(picture)))
                wait_for(http, lambda now, n=count: value(now, "saccade_requests_running") == n)
            wait_for(http, lambda now: 0 < held(now, "image_tokens") <= 60)
            for count in (1, 2):
                asked.append(threads.submit(http.post, CHAT, json=chat()))
                wait_for(http, lambda now, n=count: value(now, "saccade_requests_waiting") == n)
            error = refusal(http.post(CHAT, json=chat()))
        assert [each.result().status_code for each in asked] == [200] * 4
    assert error["code"] == "image_tokens_full"
    assert "the limit is 80" in error["message"]


def held(now: Series, resource: str) -> float:
    return value(now, "saccade_admission_held", resource=resource)


def test_the_client_of_openai_comes_back_when_there_is_room(
    scarce: Server, http: httpx.Client
) -> None:
    client = openai.OpenAI(base_url=scarce.url + "/v1", api_key="none", max_retries=5)
    before = scrape(http)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with scarce.engine_held():
            held_up = [threads.submit(http.post, CHAT, json=chat()) for _ in range(4)]
            wait_for(http, lambda now: value(now, "saccade_requests_waiting") == 2)
            answer = threads.submit(
                client.chat.completions.create,
                model="saccade-tiny",
                messages=user(WHAT),
                max_tokens=4,
            )
            rises(http, before, "saccade_refusals_total", code="server_busy")
        assert answer.result().choices[0].message.content
        assert [each.result().status_code for each in held_up] == [200] * 4


@pytest.mark.ends_server
def test_ctrl_c_ends_every_process(scarce: Server) -> None:
    """A terminal sends SIGINT to the whole process group."""
    children = scarce.children()
    assert len(children) >= 4  # the engine's two, the forkserver and an image worker
    os.killpg(scarce.process.pid, signal.SIGINT)
    assert scarce.process.wait(STOP_TIMEOUT_S) == 0
    assert_nothing_is_left(children)
