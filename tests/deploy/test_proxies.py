"""The example reverse proxies in front of the real server."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from saccade_client import Client
from server.settings import HttpSettings
from tests.conftest import Server
from tests.pictures import encode
from tests.proxies import BOTH, Backend, Proxy, backend, free_port, proxy, received
from tests.scrape import FRESH, ended_early, scrape

DEADLINE_S = 60
LONG_TOKENS = 3500

MakeProxy = Callable[..., Proxy]


@pytest.fixture(scope="module", params=BOTH)
def public(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy in front of the server; its second backend is down."""
    addresses = (server.url.removeprefix("http://"), f"127.0.0.1:{free_port()}")
    with proxy(request.param, tmp_path_factory.mktemp("proxy"), addresses) as made:
        yield made


@pytest.fixture(params=BOTH)
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def backends() -> Iterator[tuple[Backend, Backend]]:
    with backend() as one, backend() as two:
        yield one, two


@pytest.fixture
def start(tmp_path: Path) -> Iterator[MakeProxy]:
    with ExitStack() as stack:

        def start(kind: str, *addresses: str) -> Proxy:
            return stack.enter_context(proxy(kind, tmp_path, addresses))

        yield start


def chat(content: Any, **options: Any) -> dict[str, Any]:
    return {"model": "saccade-tiny", "messages": [{"role": "user", "content": content}], **options}


def metric(text: str, name: str) -> float:
    """The sum of the samples of a metric; the name may include labels."""
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def engine(server: Server, name: str) -> float:
    return metric(
        httpx.get(f"{server.url}/metrics", headers=FRESH, timeout=30).text, f"vllm:{name}"
    )


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error_of(answer: bytes) -> dict[str, Any]:
    """The error object of a raw response."""
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_disconnect_aborts_the_request(
    public: Proxy, server: Server, http: httpx.Client, stream: bool
) -> None:
    options = {"max_tokens": LONG_TOKENS, "ignore_eos": True, "stream": stream}
    body = json.dumps(chat("Count.", **options)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()

    def leaves() -> bool:
        """Whether the client disconnected in time: on a slow machine the answer may end first."""
        before = scrape(http)
        with ExitStack() as held:
            with public.sent(head + body) as connection:
                if stream:
                    assert b"data: {" in received(connection, up_to=b"data: {")
                else:
                    eventually(lambda: engine(server, "generation_tokens_total") > made)
                held.enter_context(server.engine_held())
            return ended_early(http, before)

    made = engine(server, "generation_tokens_total")
    while not leaves():
        made = engine(server, "generation_tokens_total")
    eventually(lambda: engine(server, "num_requests_running") == 0)
    assert 0 < engine(server, "generation_tokens_total") - made < LONG_TOKENS


def test_a_large_picture_is_forwarded(public: Proxy) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise))
    assert len(data) > 5 << 20
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with public.client() as client:
        response = client.post("/v1/chat/completions", json=chat(content, max_tokens=4))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def announcement(length: int) -> bytes:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_the_body_limit_equals_the_servers(public: Proxy) -> None:
    limit = HttpSettings().max_request_bytes
    assert public.exchange(announcement(limit)).startswith(b"HTTP/1.1 100 ")
    refused = public.exchange(announcement(limit + 1), up_to=b"}}")
    assert refused.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nx-request-id: " in refused.lower()
    error = error_of(refused)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "request_too_large"
    assert "256 MiB" in error["message"]  # the proxy's error page, not the server's


@pytest.mark.parametrize(
    "target",
    [
        "/metrics",
        "/metrics?/v1/models",
        "//metrics",
        "https://localhost/metrics",
        "/metrics/%2e%2e/v1/models",
        "/v1/models/../../metrics",
        "/health",
        "/ready",
        "/version/x",
        "/tokenize",
        "/detokenize",
        "/invocations",
        "/load",
        "/docs",
        "/openapi.json",
        "/v1/cache",
        "/v1/models/%2e%2e/cache",
        "/v1/load_lora_adapter",
    ],
)
def test_internal_routes_are_not_public(public: Proxy, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    answer = public.exchange(request, up_to=b"}}")
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]
    assert error_of(answer)["message"] == "there is nothing here"
    assert error_of(answer)["code"] == "not_found"


def test_public_routes_are_served_while_a_backend_is_down(public: Proxy) -> None:
    with public.client() as client:
        for _ in range(4):
            assert client.get("/v1/models").status_code == 200
            assert client.get("/v1/files?limit=3").status_code == 200
            assert client.get("/v1/batches?limit=3").status_code == 200
            asked = {"model": "saccade-tiny", "prompt": "Hello", "max_tokens": 2}
            assert client.post("/v1/completions", json=asked).status_code == 200
            sizes = {"images": [{"width": 400, "height": 300}]}
            assert client.post("/v1/images/tokens", json=sizes).status_code == 200


def test_our_client_knows_the_server(public: Proxy) -> None:
    """It resizes a picture before it sends it, and does not send it again."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    picture = encode(Image.fromarray(noise))
    sent: list[int] = []

    def note(request: httpx.Request) -> None:
        if request.url.path.endswith("/chat/completions"):
            sent.append(len(request.read()))

    with public.client() as http, Client(f"{public.url}/v1") as client:
        http.event_hooks["request"].append(note)
        client.__dict__["_http"] = http
        for _ in range(2):
            assert client.ask("What is in the image?", picture, max_tokens=2).images
    first, again = sent
    assert 1000 < first < len(picture) / 4
    assert again < 1000


def test_the_request_id_is_returned(public: Proxy) -> None:
    with public.client() as client:
        for path in ("/v1/models", "/metrics", "/v1/files/none"):
            headers = {"X-Request-Id": "mine-1"}
            answer = client.get(path, headers=headers)
            assert answer.headers.get_list("X-Request-Id") == ["mine-1"], path
        given = [client.get("/v1/models").headers["X-Request-Id"] for _ in range(2)]
        assert all(given)
        assert given[0] != given[1]


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("aZ09._:=+/-", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("a;b", False)],
)
def test_request_ids_are_kept_by_the_servers_rule(
    public: Proxy, server: Server, given: str, is_kept: bool
) -> None:
    headers = {"X-Request-Id": given}
    with public.client() as client:
        answers = [client.get("/v1/models", headers=headers)]
    answers.append(httpx.get(f"{server.url}/v1/models", headers=headers))
    for answer in answers:
        assert answer.headers["X-Request-Id"]
        assert (answer.headers["X-Request-Id"] == given) is is_kept


def test_streamed_events_are_not_buffered(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    for one in backends:
        one.streams = True
        one.may_answer.clear()
    client = start(kind, *(one.address for one in backends)).client()
    with client, client.stream("POST", "/v1/chat/completions", json={}, timeout=10) as answer:
        events = answer.iter_lines()
        assert next(events) == "data: first"
        for one in backends:
            one.may_answer.set()
        assert "data: [DONE]" in list(events)


def test_the_backend_gets_the_clients_headers_and_address(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    one, two = backends
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"X-Request-Id": "mine-2", "traceparent": trace, "Authorization": "Bearer key"}
    with start(kind, one.address, two.address).client() as client:
        for _ in range(2):
            client.post("/v1/chat/completions?a=b", json={}, headers=headers)
    heard = one.requests + two.requests
    assert len(heard) == 2
    for path, got in heard:
        assert path == "/v1/chat/completions?a=b"
        assert {name: got[name] for name in headers} == headers
        assert got["X-Forwarded-For"] == "127.0.0.1"
        assert got["X-Forwarded-Proto"] == "https"


def test_a_post_that_reached_a_backend_is_not_retried(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    one, two = backends
    one.hangs_up = two.hangs_up = True
    with start(kind, one.address, two.address).client() as client:
        answer = client.post("/v1/chat/completions", json={})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == {"haproxy": "1", "nginx": "5"}[kind]
    assert answer.json()["error"]["code"] == "unavailable"
    assert len(one.requests + two.requests) == 1


def test_a_backend_that_breaks_off_is_a_503_on_a_used_connection(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    one, two = backends
    with start(kind, one.address, two.address).client() as client:
        for hangs_up, status in ((False, 200), (True, 503), (False, 200), (True, 503)):
            one.hangs_up = two.hangs_up = hangs_up
            answer = client.post("/v1/chat/completions", json={})
            assert answer.status_code == status
            assert ("Retry-After" in answer.headers) is hangs_up


def test_a_key_always_gets_the_same_backend(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    with start(kind, *(one.address for one in backends)).client() as client:
        for n in range(60):
            headers = {"X-Session-ID": f"key {n % 20}", "X-Request-Id": f"{n}"}
            client.post("/v1/chat/completions", json={}, headers=headers)
    one, two = ({got["X-Session-ID"] for _, got in backend.requests} for backend in backends)
    assert one
    assert two
    assert not one & two
    assert all(len(backend.requests) % 3 == 0 for backend in backends)


def test_the_load_of_a_backend_is_bounded_by_haproxy_alone(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    """Twelve requests with one key are running."""
    for one in backends:
        one.may_answer.clear()
    running = start(kind, *(one.address for one in backends))

    def ask() -> None:
        with running.client() as client:
            client.post("/v1/chat/completions", json={}, headers={"X-Session-ID": "popular"})

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        eventually(lambda: sum(len(one.requests) for one in backends) == number)  # noqa: B023
    loads = sorted(len(one.requests) for one in backends)
    assert loads == {"haproxy": [3, 9], "nginx": [0, 12]}[kind]
    for one in backends:
        one.may_answer.set()
    for thread in threads:
        thread.join()


def test_the_keys_of_a_backend_that_is_down_go_to_the_other(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    one, _ = backends
    keys = [f"key {n}" for n in range(12)]
    with start(kind, one.address, f"127.0.0.1:{free_port()}").client() as client:
        for key in keys:
            answer = client.post("/v1/responses", json={}, headers={"X-Session-ID": key})
            assert answer.status_code == 200
    assert [got["X-Session-ID"] for _, got in one.requests] == keys


def test_the_keys_of_a_backend_that_has_just_died_go_to_the_other(
    kind: str, start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    """Before a check has found it dead, while the other has requests."""
    one, _ = backends
    keys = [f"key {n}" for n in range(12)]
    with backend() as dying:
        running = start(kind, dying.address, one.address)
        with running.client() as client:
            for key in keys:
                client.post("/v1/responses", json={}, headers={"X-Session-ID": key})
        assert one.requests
        assert dying.requests

    def ask(client: int) -> set[int]:
        with running.client() as used:
            return {
                used.post(
                    "/v1/responses", content=b"x" * 20_000, headers={"X-Session-ID": f"key {n}"}
                ).status_code
                for n in range(client, client + 20)
            }

    with ThreadPoolExecutor(24) as pool:
        assert set().union(*pool.map(ask, range(24))) == {200}


def test_a_request_without_a_backend_gets_a_retryable_error(kind: str, start: MakeProxy) -> None:
    closed = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with start(kind, *closed).client() as client:
        answer = client.post("/v1/chat/completions", json={}, headers={"X-Request-Id": "mine-3"})
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] == "5"
    assert answer.headers["X-Request-Id"] == "mine-3"
    assert answer.json()["error"]["code"] == "unavailable"


def test_haproxy_logs_requests(start: MakeProxy, backends: tuple[Backend, Backend]) -> None:
    running = start("haproxy", *(one.address for one in backends))
    with running.client() as client:
        client.post("/v1/completions", json={})
    eventually(lambda: '"POST /v1/completions HTTP/1.1"' in running.log.read_text())


def test_haproxy_lets_a_server_that_becomes_unready_finish_its_requests(
    start: MakeProxy, backends: tuple[Backend, Backend]
) -> None:
    one, two = backends
    running = start("haproxy", one.address, two.address)

    def is_up(name: str) -> bool:
        sample = f'haproxy_server_status{{proxy="saccade",server="{name}",state="UP"}} 1'
        return sample in httpx.get(running.metrics_url).text

    with running.client() as client:
        eventually(lambda: is_up("one") and is_up("two"))
        two.may_answer.clear()
        answers: list[httpx.Response] = []

        def ask_two() -> None:
            while not two.requests:
                answers.append(client.post("/v1/completions", json={}))

        asking = threading.Thread(target=ask_two)
        asking.start()
        eventually(lambda: len(two.requests) == 1)
        two.is_ready = False
        eventually(lambda: not is_up("two"))
        for _ in range(4):
            assert client.post("/v1/completions", json={}).status_code == 200
        assert len(two.requests) == 1
        two.may_answer.set()
        asking.join(DEADLINE_S)
        assert answers[-1].status_code == 200
        two.is_ready = True
        eventually(lambda: is_up("two"))
