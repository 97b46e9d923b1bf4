"""Two real servers behind each router: a picture goes where it was before."""

import asyncio
import hashlib
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from PIL import Image

from saccade_client import Client, affinity
from tests import loads, pictures, same_answers
from tests.conftest import Server, serving
from tests.routers import ALL, Router, router
from tests.scrape import scrape

PICTURES = 16
CHAT = "/v1/chat/completions"

Start = Callable[[str], Router]


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    flags = ("--max-model-len", "2048", "--mm-processor-cache-gb", "1", "--max-num-seqs", "64")
    flags += same_answers.FLAGS
    with serving(*flags) as one, serving(*flags) as two:
        yield [one, two]


@pytest.fixture(scope="module")
def start(pair: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts each router once."""
    with ExitStack() as stack:
        made: dict[str, Router] = {}

        def start(kind: str) -> Router:
            if kind not in made:
                urls = [server.url for server in pair]
                folder = tmp_path_factory.mktemp(kind)
                made[kind] = stack.enter_context(router(kind, folder, urls))
            return made[kind]

        yield start


def album(name: str) -> list[bytes]:
    """Pictures that no other test asks about."""
    digests = [hashlib.sha256(f"{name} {n}".encode()).digest() for n in range(PICTURES)]
    return [pictures.encode(Image.new("RGB", (224, 224), tuple(digest[:3]))) for digest in digests]


def question(*parts: Any, **options: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is in the image?"}]
    return {
        "model": "saccade-tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        **options,
    }


def asked(http: httpx.Client, picture: bytes) -> Any:
    """How far the picture was cached."""
    body = question(pictures.image_part(picture), include_image_details=True)
    # A proxy in front adds an id to each request, which vllm-router would hash without a key.
    key = affinity.headers(affinity.of_source(picture), {})
    answer = http.post(CHAT, json=body, headers={**key, "X-Request-Id": uuid.uuid4().hex})
    assert answer.status_code == 200, answer.text
    return answer.json()["image_details"][0]["cached"]


def answered(pair: list[Server]) -> list[float]:
    """How many requests each server has answered."""
    totals = []
    for server in pair:
        with httpx.Client(base_url=server.url) as http:
            series = scrape(http)
        totals.append(
            sum(
                value
                for (name, labels), value in series.items()
                if name == "saccade_requests_total" and ("outcome", "answered") in labels
            )
        )
    return totals


@pytest.mark.parametrize("kind", ALL)
def test_a_picture_goes_where_it_was_before(kind: str, start: Start, pair: list[Server]) -> None:
    with start(kind).client() as http:
        before = answered(pair)
        found = [[asked(http, picture) for picture in album(kind)] for _ in range(2)]
        shares = [now - then for now, then in zip(answered(pair), before, strict=True)]
    assert found == [["none"] * PICTURES, ["embedding"] * PICTURES]
    assert min(shares) >= 2, "one server got everything"
    assert sum(shares) == 2 * PICTURES


@pytest.mark.parametrize("kind", ALL)
def test_requests_without_pictures_go_to_all_servers(
    kind: str, start: Start, pair: list[Server]
) -> None:
    before = answered(pair)
    with start(kind).client() as http:
        for n in range(24):
            # vllm-router needs this, which the proxies of `deploy/` add.
            headers = {"X-Request-Id": f"request-{n}"}
            assert http.post(CHAT, json=question(max_tokens=1), headers=headers).is_success
    assert min(now - then for now, then in zip(answered(pair), before, strict=True)) >= 2


@pytest.fixture(scope="module")
def direct(pair: list[Server]) -> dict[str, str]:
    """The answers of both servers when they have the pictures."""
    found = []
    for server in (*pair, *pair):
        with httpx.Client(base_url=server.url, timeout=120) as http:
            found.append(same_answers.answers(http))
    assert found[2] == found[3]
    return found[3]


@pytest.mark.parametrize("kind", ALL)
def test_answers_through_a_router_equal_direct_ones(
    kind: str, start: Start, pair: list[Server], direct: dict[str, str]
) -> None:
    expected = direct
    if kind == "vllm-router":  # it does not pass on that a tool is strict
        with httpx.Client(base_url=pair[0].url, timeout=120) as http:
            expected = same_answers.answers(http, strict=False)
        assert expected != direct
    with start(kind).client() as http:
        assert same_answers.answers(http) == expected


@pytest.mark.parametrize("kind", ALL)
def test_a_body_of_50_mb_goes_through(kind: str, start: Start) -> None:
    with start(kind).client() as http:
        loads.ask_about_50_mb(http)


@pytest.mark.parametrize("kind", ALL)
def test_200_streams_go_through_at_the_same_time(kind: str, start: Start) -> None:
    router = start(kind)
    asyncio.run(loads.run_200_streams(router.url, router.tls))


@pytest.mark.ends_server
def test_a_server_that_is_killed_costs_no_client_its_answer(
    start: Start, pair: list[Server]
) -> None:
    routers = {kind: start(kind) for kind in ALL}
    pair[1].process.send_signal(signal.SIGKILL)
    for kind, one in routers.items():
        client = Client(f"{one.url}/v1", timeout_s=60)
        with client, one.client() as http:
            client.__dict__["_http"] = http
            for picture in album(f"{kind} after"):
                assert client.ask("What is in the image?", picture, max_tokens=4).text, kind
