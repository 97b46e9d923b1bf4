"""Two tiers on Ray Serve: one front and two engines answer as one server does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import same_answers
from tests.conftest import OF_SERVERS, STOP_TIMEOUT_S, Server, assert_nothing_is_left, serving
from tests.pictures import encode, image_part, photo, text_part, user
from tests.same_answers import CHAT, WHAT, answers, ask
from tests.starts import ENGINES

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402

FLAGS = ("--max-model-len", "4096", *same_answers.FLAGS)
PATIENCE_S = 240


@contextlib.contextmanager
def folder_of_ray() -> Iterator[None]:
    """A folder for what Ray writes here and in processes that start in the body."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = folder / "token"
    token.write_text("a" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.delenv("RAY_AUTH_MODE")  # Ray sets it, and only then reads it
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        # Else Ray ends its processes when those of others need the memory.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def deployed(*flags: str) -> Iterator[Server]:
    """`saccade deploy` on a cluster of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "deploy", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), *FLAGS, *flags],
        env=os.environ | OF_SERVERS | ENGINES | {"SACCADE_IMAGE_WORKERS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    log: list[str] = []
    server = Server(process, log)  # type: ignore[arg-type]
    reading = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reading.start()
    children: list[psutil.Process] = []
    try:
        _await_ready(server)
        yield server
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = server.children()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        for each in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()


def _await_ready(server: Server) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and server.process.poll() is None:
        for line in list(server.log):
            if match := re.search(r"ready: .* on (http://\S+)", line):
                server.url = match[1]
                return
        time.sleep(0.2)
    raise RuntimeError("the deployment did not come up:\n" + "".join(server.log[-60:]))


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """The answers of a server of one process, which has ended."""
    with serving(*FLAGS) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        return answers(http)


@pytest.fixture(scope="module")
def deployment(alone: dict[str, str]) -> Iterator[Server]:
    with folder_of_ray(), deployed("--engine-replicas", "2") as running:
        yield running


@pytest.fixture(scope="module")
def engines(deployment: Server) -> Iterator[Any]:
    """A handle to the engines."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    try:
        yield serve.get_deployment_handle("Engine", "saccade")
    finally:
        ray.shutdown()


@pytest.fixture
def client(deployment: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployment.url, timeout=PATIENCE_S) as http:
        yield http


def loads(engines: Any) -> list[Any]:
    found: list[Any] = engines.broadcast("load").results(timeout_s=PATIENCE_S)
    return found


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextlib.contextmanager
def long_answer(client: httpx.Client, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream whose first event has arrived."""
    body = {
        **{"model": "saccade-tiny", "messages": user(text_part("Hello")), "stream": True},
        **{"max_tokens": tokens, "ignore_eos": True},
    }
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_answers_equal_those_of_one_process(client: httpx.Client, alone: dict[str, str]) -> None:
    found = answers(client)
    assert found.keys() == alone.keys()
    for name, answer in found.items():
        assert answer == alone[name]


def test_a_picture_returns_to_the_engine_that_has_its_embedding(
    client: httpx.Client, engines: Any
) -> None:
    before = {load.pid: load.total for load in loads(engines)}
    sent = sent_to_engines(client)
    pictures = [image_part(encode(photo((160, 120), seed), "JPEG")) for seed in range(100, 120)]
    for turn in range(2):
        for picture in pictures:
            answer = ask(client, picture, WHAT, include_image_details=True, max_tokens=1).json()
            (detail,) = answer["image_details"]
            assert detail["cached"] == ("none" if turn == 0 else "embedding")
    rises = [load.total - before[load.pid] for load in loads(engines)]
    assert sum(rises) == 2 * len(pictures)
    assert all(rise and rise % 2 == 0 for rise in rises)
    # Of each patch one frame, and of each picture once.
    patches = 160 * 128 * 3 * len(pictures)
    assert [now - then for now, then in zip(sent_to_engines(client), sent, strict=True)] == [
        patches,
        patches,
    ]


def sent_to_engines(client: httpx.Client) -> list[int]:
    """Bytes of features that were put into the store, and that were there already."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    name = "saccade_features_to_engines_bytes_total"
    found = {each.labels["how"]: int(each.value) for each in samples if each.name == name}
    return [found["stored"], found["reused"]]


def test_a_client_that_leaves_ends_its_request_in_the_engine(
    client: httpx.Client, engines: Any
) -> None:
    with long_answer(client, 3500):
        assert sum(load.running for load in loads(engines)) == 1
    until(lambda: sum(load.running for load in loads(engines)) == 0)


def test_a_large_body_and_a_wrong_one(client: httpx.Client) -> None:
    noise = image_part(os.urandom(40 << 20))
    refused = ask(client, noise, WHAT)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_image_format"
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_requests_of_a_killed_engine_get_a_503_and_another_one_starts(
    client: httpx.Client, deployment: Server, engines: Any
) -> None:
    pending: list[httpx.Response] = []

    def wait_for_an_answer() -> None:
        pending.append(ask(client, text_part("Hello"), max_tokens=3500, ignore_eos=True))

    with long_answer(client, 3500) as lines:
        asking = threading.Thread(target=wait_for_an_answer)
        asking.start()
        until(lambda: sum(load.running for load in loads(engines)) == 2)
        killed = {load.pid for load in loads(engines)}
        assert len(killed) == 2
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "unavailable"
        asking.join(PATIENCE_S)
    until(lambda: client.get("/ready").status_code == 503)
    refused = ask(client, text_part("Hello"), max_tokens=2)
    for answer in (*pending, refused):
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "5"
    assert len(pending) == 1

    def have_started() -> bool:
        with contextlib.suppress(RayError, RayServeException):
            return len({load.pid for load in loads(engines)} - killed) == 2
        return False

    until(have_started)
    until(lambda: client.get("/ready").status_code == 200)
    assert ask(client, text_part("Hello"), max_tokens=2).status_code == 200


@pytest.mark.ends_server
def test_a_signal_ends_all_after_their_answers(client: httpx.Client, deployment: Server) -> None:
    children = deployment.children()
    with long_answer(client, 600) as lines:
        deployment.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    assert deployment.process.wait(STOP_TIMEOUT_S) == 0, "".join(deployment.log[-40:])
    assert_nothing_is_left(children)
