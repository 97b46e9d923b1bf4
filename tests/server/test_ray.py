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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import same_answers
from tests.conftest import (
    OF_SERVERS,
    SEVERAL_ENGINES,
    STOP_TIMEOUT_S,
    Server,
    assert_nothing_is_left,
    serving,
)
from tests.pictures import encode, image_part, photo, text_part, user
from tests.same_answers import CHAT, WHAT, answers, ask
from tests.starts import ENGINES

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402

from server.scale.deployment import NAME, application  # noqa: E402

FLAGS = ("--max-model-len", "4096", *same_answers.FLAGS)
# The second front only reserves a CPU, for a test that starts it.
TIERS = ("--engine-replicas", "2", "--front-max-replicas", "2")

pytestmark = pytest.mark.group(SEVERAL_ENGINES)

PATIENCE_S = 240
ENVIRONMENT = OF_SERVERS | ENGINES | {"SACCADE_IMAGE_WORKERS": "1"}


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
        env=os.environ | ENVIRONMENT,
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
    with folder_of_ray(), deployed(*TIERS) as running:
        yield running


@pytest.fixture(scope="module")
def engines(deployment: Server) -> Iterator[Any]:
    """A handle to the engines."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    try:
        yield serve.get_deployment_handle("Engine", NAME)
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


class Load:
    """Clients in the body of `with` that ask for long answers, one after another.

    Attributes:
        outcomes: of each request: 200 if its answer was whole, else what went wrong.
    """

    def __init__(self, url: str, clients: int) -> None:
        self.outcomes: list[int | str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stop.is_set():
                try:
                    answer = ask(client, text_part("Hello"), max_tokens=200, ignore_eos=True)
                    tokens = answer.json().get("usage", {}).get("completion_tokens")
                    is_whole = answer.status_code == 200 and tokens == 200
                    self.outcomes.append(200 if is_whole else answer.text)
                except httpx.HTTPError as error:
                    self.outcomes.append(repr(error))


def running(tier: str) -> int:
    states = serve.status().applications[NAME].deployments[tier].replica_states
    return sum(states.values()) if set(states) == {"RUNNING"} else -1


@pytest.mark.nightly
def test_no_request_fails_while_tiers_are_updated_and_scaled(
    client: httpx.Client, deployment: Server, engines: Any
) -> None:
    """From two engines and a front to one or two of each, by load."""
    flags = (
        *("--engine-max-replicas", "2", "--front-max-replicas", "2", "--max-num-seqs", "8"),
        # Down after longer than it takes until the load is known after an update.
        *("--scale-up-delay-s", "0", "--scale-down-delay-s", "20"),
    )
    with Load(deployment.url, 12) as load, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        before = {each.pid for each in loads(engines)}
        serve.run(application([*FLAGS, *flags]), name=NAME, route_prefix="/")
        until(lambda: running("Front") == running("Engine") == 2)
        assert not before & {each.pid for each in loads(engines)}
    assert set(load.outcomes) == {200}
    until(lambda: running("Front") == running("Engine") == 1)

    pictures = [image_part(encode(photo((160, 120), seed), "JPEG")) for seed in range(200, 224)]
    whence = [stage(client, picture) for _ in range(2) for picture in pictures]
    assert whence[len(pictures) :] == ["embedding"] * len(pictures)
    with Load(deployment.url, 12) as load:
        until(lambda: running("Front") == running("Engine") == 2)
        found = Counter(stage(client, picture) for picture in pictures)
        # About one half went to the new engine, which has none of them.
        assert 0 < found["embedding"] < len(pictures)
    assert set(load.outcomes) == {200}
    until(lambda: running("Front") == running("Engine") == 1)
    assert ask(client, text_part("Hello"), max_tokens=2).status_code == 200


def stage(client: httpx.Client, picture: dict[str, Any]) -> str:
    """How far a picture was cached."""
    answer = ask(client, picture, WHAT, include_image_details=True, max_tokens=1).json()
    return str(answer["image_details"][0]["cached"])


@pytest.mark.ends_server
def test_a_signal_ends_all_after_their_answers(client: httpx.Client, deployment: Server) -> None:
    children = deployment.children()
    with long_answer(client, 600) as lines:
        deployment.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    assert deployment.process.wait(STOP_TIMEOUT_S) == 0, "".join(deployment.log[-40:])
    assert_nothing_is_left(children)
