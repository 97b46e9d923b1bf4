"""`saccade serve --replicas`: two whole servers behind one address, which survive each other."""

import asyncio
import contextlib
import json
import os
import re
import signal
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
from openai import OpenAI

from saccade_client import Client, affinity
from tests import loads, same_answers
from tests.conftest import (
    SEVERAL_ENGINES,
    STOP_TIMEOUT_S,
    Server,
    assert_nothing_is_left,
    command_line,
    serving,
)
from tests.pictures import encode, image_part, photo, shape, text_part, user
from tests.same_answers import CHAT, WHAT, ask
from tests.scrape import scrape
from tests.starts import ENGINES

A, FEW, ADMIN = "sk-of-a", "sk-of-few", "sk-of-admin"
KEYS = {"groups": {"team-a": [A], "few": [{"key": FEW, "requests_per_minute": 3}]}}
FLAGS = ("--max-model-len", "4096", "--max-num-seqs", "64", *same_answers.FLAGS)
RED = encode(shape("red"))
PICTURES = [encode(photo((160, 120), seed), "JPEG") for seed in range(300, 316)]
pytestmark = pytest.mark.group(SEVERAL_ENGINES)

PATIENCE_S = 120
# A replica is started again after a second, and then loads its model.
AGAIN_S = 240


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({**KEYS, "admin": [ADMIN]}))
    files = tmp_path_factory.mktemp("files")
    with serving(
        *("--replicas", "2", *FLAGS, "--api-keys-file", str(keys)),
        *("--files", "--files-dir", str(files), "--drain-delay-s", "2"),
        executed=True,
        SACCADE_IMAGE_WORKERS="1",
    ) as running:
        yield running


@contextlib.contextmanager
def connected(fleet: Server, key: str = A) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=fleet.url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def client(fleet: Server) -> Iterator[httpx.Client]:
    with connected(fleet) as http:
        yield http


def replica(fleet: Server, index: int) -> psutil.Process:
    named = fleet.named(f"/replicas/replica-{index}")
    (found,) = (each for each in named if each.ppid() == fleet.process.pid)
    return found


def answered(client: httpx.Client) -> list[float]:
    """How many requests each replica has answered."""
    totals = [0.0, 0.0]
    for (name, labels), value in scrape(client).items():
        given = dict(labels)
        if name == "saccade_requests_total" and given["outcome"] == "answered":
            totals[int(given["replica"])] += value
    return totals


def about(client: httpx.Client, picture: bytes) -> tuple[str, int]:
    """How far a picture was cached, and the replica that was asked."""
    before = answered(client)
    body = {
        **{"model": "saccade-tiny", "max_tokens": 1, "include_image_details": True},
        "messages": user(image_part(picture), WHAT),
    }
    key = affinity.headers(affinity.of_source(picture), {})
    answer = client.post(CHAT, json=body, headers=key)
    assert answer.status_code == 200, answer.text
    shares = [now - then for now, then in zip(answered(client), before, strict=True)]
    assert sorted(shares) == [0, 1]
    return answer.json()["image_details"][0]["cached"], shares.index(1)


def until(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_answers_equal_those_of_one_server(fleet: Server, client: httpx.Client) -> None:
    """Of each replica, which is one, when it has the pictures."""
    direct = []
    for index in (0, 1, 0, 1):
        title = command_line(replica(fleet, index))
        (path,) = re.findall(rf"\S+/replicas/replica-{index}\b", title)
        over, base = httpx.HTTPTransport(uds=path), "http://replica"
        headers = {"Authorization": f"Bearer {A}"}
        with httpx.Client(
            transport=over, base_url=base, headers=headers, timeout=PATIENCE_S
        ) as http:
            direct.append(same_answers.answers(http))
    assert direct[2] == direct[3]
    before = answered(client)
    for _ in range(2):
        assert same_answers.answers(client) == direct[3]
    assert all(now > then for now, then in zip(answered(client), before, strict=True))


def test_a_picture_returns_to_the_replica_that_has_it(client: httpx.Client) -> None:
    first, again = ([about(client, picture) for picture in PICTURES] for _ in range(2))
    assert {cached for cached, _ in first} == {"none"}
    assert {cached for cached, _ in again} == {"embedding"}
    homes = [home for _, home in again]
    assert homes == [home for _, home in first]
    assert set(homes) == {0, 1}


def test_probes_and_metrics_are_of_all(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(f"{client.base_url}{path}").status_code == 200
    series = scrape(client)
    for index in ("0", "1"):
        assert series["saccade_replica_up", (("replica", index),)] == 1
    assert client.get("/version").json()["saccade"]


def test_an_uploaded_file_is_known_to_all(client: httpx.Client) -> None:
    openai = OpenAI(base_url=f"{client.base_url}/v1", api_key=A, max_retries=0, http_client=client)
    uploaded = openai.files.create(file=("a.png", RED), purpose="vision")
    part = {"type": "image_url", "image_url": {"file_id": uploaded.id}}
    before = answered(client)
    for number in range(16):
        body = {"model": "saccade-tiny", "messages": user(part, WHAT), "max_tokens": 1}
        answer = client.post(CHAT, json=body, headers={"X-Session-ID": f"{number}"})
        assert answer.status_code == 200, answer.text
    assert all(now > then for now, then in zip(answered(client), before, strict=True))
    assert openai.files.content(uploaded.id).read() == RED
    assert client.delete(f"/v1/files/{uploaded.id}").status_code == 200


def test_a_batch_is_run(client: httpx.Client) -> None:
    openai = OpenAI(base_url=f"{client.base_url}/v1", api_key=A, max_retries=0, http_client=client)
    body = {"model": "saccade-tiny", "max_tokens": 2, "messages": user(text_part("Hello"))}
    line = json.dumps({"custom_id": "one", "method": "POST", "url": CHAT, "body": body})
    file = openai.files.create(file=("in.jsonl", line.encode()), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    until(lambda: openai.batches.retrieve(batch.id).status == "completed")


def test_limits_of_keys_are_counted_together(fleet: Server) -> None:
    with connected(fleet, FEW) as few:
        body = {"model": "saccade-tiny", "messages": user(text_part("Hello")), "max_tokens": 1}
        statuses = Counter(
            few.post(CHAT, json=body, headers={"X-Session-ID": f"{n}"}).status_code
            for n in range(12)
        )
    assert statuses == {200: 3, 429: 9}


def test_caches_of_all_are_cleared(fleet: Server, client: httpx.Client) -> None:
    about(client, PICTURES[0])
    assert client.get("/v1/cache").status_code == 403
    with connected(fleet, ADMIN) as admin:
        found = admin.get("/v1/cache").json()["data"]
        assert [each["object"] for each in found] == ["cache", "cache"]
        assert admin.delete("/v1/cache").status_code == 200
    assert [about(client, picture)[0] for picture in PICTURES] == ["none"] * len(PICTURES)


def test_a_body_of_50_mb_goes_through(client: httpx.Client) -> None:
    loads.ask_about_50_mb(client)


def test_200_streams_go_through_at_the_same_time(fleet: Server) -> None:
    asyncio.run(loads.run_200_streams(fleet.url, key=A))


def test_a_kill_under_load_costs_the_requests_in_flight_only(
    fleet: Server, client: httpx.Client
) -> None:
    homes = {picture: about(client, picture)[1] for picture in PICTURES}
    ends: Counter[str] = Counter()
    failures: list[str] = []
    stops = threading.Event()

    def load(number: int) -> None:
        """Requests of a client that does not try again, on one connection."""
        with connected(fleet) as http:
            while not stops.is_set():
                headers = {"X-Session-ID": f"{number}"}
                body = {"model": "saccade-tiny", "messages": user(WHAT), "max_tokens": 40}
                answer = http.post(CHAT, json=body, headers=headers)
                ends[f"{answer.status_code} {answer.headers.get('Retry-After', '')}"] += 1

    def patient() -> None:
        """Our client."""
        with Client(f"{fleet.url}/v1", api_key=A, timeout_s=PATIENCE_S) as ours:
            while not stops.is_set():
                for picture in PICTURES:
                    try:
                        ours.ask("What is in the image?", picture, max_tokens=20)
                    except Exception as error:
                        failures.append(repr(error))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    threads += [threading.Thread(target=patient) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: ends["200 "] >= 24)
    killed = replica(fleet, 1)
    killed.kill()
    before = ends["200 "]
    until(lambda: ends["200 "] >= before + 24)
    assert httpx.get(f"{fleet.url}/ready").status_code == 200
    stops.set()
    for thread in threads:
        thread.join()
    assert failures == []
    failed = {end: count for end, count in ends.items() if end != "200 "}
    assert failed.keys() <= {"503 1"}
    assert sum(failed.values()) <= 8
    # Nothing of the killed one is left to compete with the next.
    until(lambda: _is_up(client, 1), AGAIN_S)
    assert replica(fleet, 1).pid != killed.pid
    until(lambda: about(client, PICTURES[0])[1] == homes[PICTURES[0]])
    time.sleep(3)  # haproxy's checks
    assert {picture: about(client, picture)[1] for picture in PICTURES} == homes
    series = scrape(client)
    assert series["saccade_replica_restarts_total", (("replica", "1"),)] == 1


def _is_up(client: httpx.Client, index: int) -> bool:
    return scrape(client)["saccade_replica_up", (("replica", f"{index}"),)] == 1


def test_haproxy_is_started_again(fleet: Server, client: httpx.Client) -> None:
    (proxy,) = fleet.named("haproxy.cfg")
    proxy.kill()
    until(lambda: [each.pid for each in fleet.named("haproxy.cfg")] not in ([], [proxy.pid]))
    with connected(fleet) as http:
        assert ask(http, text_part("Hello"), max_tokens=1).status_code in (200, 503)
        until(lambda: ask(http, text_part("Hello"), max_tokens=1).status_code == 200)


def test_a_signal_ends_all_after_their_answers(fleet: Server, client: httpx.Client) -> None:
    children = fleet.children()
    body: dict[str, Any] = {"model": "saccade-tiny", "stream": True, "ignore_eos": True}
    body |= {"max_tokens": 600, "messages": user(text_part("Hello"))}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        fleet.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{fleet.url}/ready").status_code == 503)
        assert ask(client, text_part("Hello"), max_tokens=1).status_code == 200
        assert "data: [DONE]" in list(lines)
    assert fleet.process.wait(STOP_TIMEOUT_S) == 0, "".join(fleet.log[-20:])
    assert_nothing_is_left(children)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("signal", 130, "stopped during start-up"), ("kill", 1, "replica 1 has ended with signal 9")],
)
def test_an_end_during_the_start_leaves_nothing(end: str, status: int, said: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        end_during_start(end, status, said, folder)
        left = [file.name for file in Path(folder).iterdir() if file.name.startswith("saccade-run")]
    assert len(left) <= (end == "kill"), "only a replica that was killed removes nothing"


def end_during_start(end: str, status: int, said: str, folder: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--replicas", "2"]
    env = {**os.environ, **ENGINES, "TMPDIR": folder}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    assert process.stderr is not None
    while "starting 2 replicas" not in process.stderr.readline():
        assert process.poll() is None
    parent = psutil.Process(process.pid)
    until(lambda: len(parent.children()) == 3)  # haproxy and two replicas
    time.sleep(1)
    children = parent.children(recursive=True)
    if end == "kill":
        parent.children()[-1].kill()
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert said in errors
    assert "Traceback" not in errors
    assert process.returncode == status
    assert_nothing_is_left(children)
