"""An engine that is started again in the same server (`--restart-engine`)."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests import pictures
from tests.conftest import STOP_TIMEOUT_S, Server, assert_nothing_is_left, serving
from tests.pictures import image_part, shape, text_part, user
from tests.scrape import scrape, value, wait_for
from tests.server.test_lifecycle import (
    LONG,
    UNAVAILABLE,
    check_failed,
    check_refused,
    ended,
    left_behind,
    pictures_sent,
    requests_running,
    until,
)

MOST = 3
# An engine that has been silent for so long is killed.
STALL_S = 10
START_TIMEOUT_S = 300
RESTARTS = "saccade_engine_restarts_total"


@pytest.fixture(scope="module")
def restarting() -> Iterator[Server]:
    flags = ["--restart-engine", "--max-engine-restarts", str(MOST), "--max-model-len", "4096"]
    flags += ["--engine-stall-timeout-s", str(STALL_S)]
    with serving(*flags, "--api-key", "sk-secret-of-flag") as server:
        yield server


@pytest.fixture(scope="module")
def web(restarting: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer sk-secret-of-flag"}
    with httpx.Client(base_url=restarting.url, headers=headers, timeout=60) as client:
        yield client


def ask(web: httpx.Client, color: str) -> tuple[str, list[str]]:
    """The answer to a question about a picture, and where its embedding came from."""
    picture = image_part(pictures.encode(shape(color)))
    body = {
        "messages": user(text_part("What is in the image?"), picture),
        "temperature": 0,
        "max_tokens": 8,
        "include_image_details": True,
    }
    answer = web.post("/v1/chat/completions", json=body).raise_for_status().json()
    text = answer["choices"][0]["message"]["content"]
    return text, [image["cached"] for image in answer["image_details"]]


def await_ready(web: httpx.Client) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while web.get("/ready").status_code != 200:
        assert web.get("/health").status_code == 200
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("victim", "number", "color"),
    [
        ("VLLM::EngineCore", signal.SIGKILL, "red"),
        ("VLLM::Worker", signal.SIGKILL, "green"),
        ("VLLM::EngineCore", signal.SIGSTOP, "blue"),  # it hangs
    ],
)
def test_a_dead_engine_comes_back_with_the_embeddings_in_host_memory(
    restarting: Server, web: httpx.Client, victim: str, number: signal.Signals, color: str
) -> None:
    before, segments = ask(web, color), left_behind(restarting)
    restarts = value(scrape(web), RESTARTS)
    others = set(restarting.children()) - set(restarting.named("VLLM::"))
    with sent_until_ready(restarting, web) as answers, requests_running(web) as running:
        killed = restarting.named(victim)[0]
        killed.send_signal(number)
        until(lambda: web.get("/ready").status_code == 503)
        assert web.get("/health").status_code == 200
        refused = web.post("/v1/chat/completions", json={**LONG, "max_tokens": 2})
        check_refused(refused, "unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
    check_failed(running, *UNAVAILABLE)
    for answer in answers:
        if answer.status_code != 200:
            check_refused(answer, "unavailable")
    assert answers[-1].status_code == 200
    assert ask(web, color) == (before[0], ["embedding"])
    assert value(scrape(web), RESTARTS) == restarts + 1
    wait_for(web, lambda now: value(now, "saccade_requests_running") == 0)
    assert others <= set(restarting.children()), "the server and its workers went on"
    assert len(restarting.named("VLLM::")) == 2
    assert not [child for child in restarting.children() if is_zombie(child)]
    assert len(left_behind(restarting)) == len(segments)


def is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def sent_until_ready(server: Server, web: httpx.Client) -> Iterator[list[httpx.Response]]:
    """Clients send pictures that are not cached, during the block and until the engine is back."""
    stop = threading.Event()
    with pictures_sent(server, stop) as answers:
        try:
            yield answers
            await_ready(web)
            count = len(answers)
            until(lambda: any(answer.status_code == 200 for answer in answers[count:]))
        finally:
            stop.set()
    answers.sort(key=lambda answer: answer.status_code == 200)


@pytest.mark.ends_server
def test_an_engine_that_dies_again_and_again_ends_the_server(
    restarting: Server, web: httpx.Client
) -> None:
    """It has been started again `MOST` times before."""
    assert value(scrape(web), RESTARTS) == MOST
    children, files = restarting.children(), left_behind(restarting)
    restarting.named("VLLM::EngineCore")[0].kill()
    assert restarting.process.wait(STOP_TIMEOUT_S) == 1
    assert_nothing_is_left(children)
    assert not [file for file in files if file.exists()]
    assert f"started again {MOST} times" in "".join(restarting.log)


def test_a_signal_while_the_engine_starts_again_ends_the_server() -> None:
    with serving("--restart-engine") as server:
        server.named("VLLM::EngineCore")[0].kill()
        until(lambda: bool(server.named("spawn_main")))  # the new one, before it has its name
        children, files = server.children(), left_behind(server)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(STOP_TIMEOUT_S)
        assert_nothing_is_left(children)
        assert not [file for file in files if file.exists()]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--api-server-count 2", "several front ends"),
        ("--data-parallel-size 2", "several engines"),
        ("--mm-processor-cache-type shm", "--mm-processor-cache-type shm"),
    ],
)
def test_what_cannot_be_restarted_is_refused_at_the_start(flags: str, why: str) -> None:
    found = ended(f"serve --port 0 --restart-engine {flags}")
    assert found.returncode == 1
    assert f"cannot start: --restart-engine: not with {why}" in found.stderr
