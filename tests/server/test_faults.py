"""Images, animations, PDFs and videos while the processes that decode them are killed."""

import concurrent.futures
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import httpx
import numpy as np
import psutil

from tests import clips, media
from tests.conftest import Server, command_line
from tests.pictures import data_url, encode, photo, text_part, user
from tests.scrape import Series, value, wait_for

SENDERS = 4
PHOTO = photo((1600, 1200))


def picture(number: int) -> dict[str, Any]:
    url = data_url(encode(PHOTO, "JPEG", comment=b"%d" % number), "image/jpeg")
    return {"type": "image_url", "image_url": {"url": url, "max_tokens": 50}}


FRAMES = [photo((160, 120), index) for index in range(2)] * 4


def animation(number: int) -> dict[str, Any]:
    frames = FRAMES
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"%d" % number)
    url = data_url(data, "image/gif")
    return {"type": "image_url", "image_url": {"url": url, "frames": 4, "max_tokens": 20}}


def document(number: int) -> dict[str, Any]:
    return media.file_part(media.pdf((200, 160), (160, 200)) + b"\n%% %d" % number)


def video(number: int) -> dict[str, Any]:
    frames = [np.full((64, 96, 3), number % 250, np.uint8)] * 4
    url = data_url(clips.of_frames(frames), "video/mp4")
    return {"type": "video_url", "video_url": {"url": url}}


KINDS: tuple[Callable[[int], dict[str, Any]], ...] = (picture, animation, document, video)
Outcome = tuple[str, httpx.Response]


def ask(http: httpx.Client, kind: Callable[[int], dict[str, Any]], number: int) -> Outcome:
    body = {
        "model": "saccade-tiny",
        "messages": user(kind(number), text_part("What is it?")),
        "max_tokens": 2,
    }
    return kind.__name__, http.post("/v1/chat/completions", json=body, timeout=180)


def kill(processes: list[psutil.Process]) -> int:
    """Kill those that still run; returns how many did."""
    killed = 0
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
        killed += 1
    return killed


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a new forkserver imports vLLM
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes(server: Server, victims: str) -> list[psutil.Process]:
    if victims == "clip":
        return server.named("VideoDecoder")[:1]
    workers = server.image_workers()
    if victims == "forkserver":
        return [psutil.Process(workers[0].ppid())]
    return workers[:1] if victims == "one worker" else workers


def kill_at_random(server: Server) -> None:
    """Kill processes for some seconds."""
    random = Random(3)
    half = ["one worker"] * 2 + ["all workers", "clip"]
    for victims in (*random.sample(half, 4), "forkserver", *random.sample(half, 4)):
        until(lambda: len(server.image_workers()) == 2)
        until(lambda victims=victims: kill(processes(server, victims)) > 0)
        time.sleep(random.uniform(0, 0.4))


def is_whole(now: Series) -> bool:
    """Whether all workers are up, and nothing is in work."""
    idle = [
        value(now, "saccade_image_queue"),
        value(now, "saccade_image_workers_busy"),
        value(now, "saccade_admission_held", resource="decode_pixels"),
        value(now, "saccade_requests_running"),
    ]
    up = value(now, "saccade_image_workers_up")
    return not any(idle) and up == value(now, "saccade_image_workers")


def test_no_healthy_request_fails_while_its_processes_are_killed(
    server: Server, http: httpx.Client
) -> None:
    stop, outcomes, numbers = threading.Event(), list[Outcome](), itertools.count()

    def send() -> None:
        while not stop.is_set():
            number = next(numbers)
            outcomes.append(ask(http, KINDS[number % len(KINDS)], number))

    with concurrent.futures.ThreadPoolExecutor(SENDERS) as threads:
        sending = [threads.submit(send) for _ in range(SENDERS)]
        try:
            kill_at_random(server)
        finally:
            stop.set()
        for each in sending:
            each.result()
    answered = Counter(kind for kind, response in outcomes if response.status_code == 200)
    assert min(answered[kind.__name__] for kind in KINDS) > 0, answered
    for kind, response in outcomes:
        if response.status_code != 200:
            assert response.status_code == 503, (kind, response.text)
            assert response.json()["error"]["code"] == "worker_lost", (kind, response.text)
            assert response.headers["Retry-After"]

    wait_for(http, is_whole, 300)
    assert http.get("/ready").status_code == 200
    assert len(server.image_workers()) == 2
    assert not server.named("VideoDecoder")
    for kind in KINDS:
        name, response = ask(http, kind, next(numbers))
        assert response.status_code == 200, (name, response.text)
    defunct = [child.pid for child in server.children() if not command_line(child)]
    assert not defunct
