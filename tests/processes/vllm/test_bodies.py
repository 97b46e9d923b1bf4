"""Bodies and headers as the body reader gets them: bytes held by all, slow and waiting bodies."""

import asyncio
import contextlib
import functools
import hashlib
import http.client
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.types import ASGIApp

from server.concurrency import Turns
from server.errors import BodyMemoryFull, SaccadeError
from server.http import headers, protocol
from server.http.body import BodyReader
from server.http.byte_budget import ByteBudget, Expected
from server.http.head_check import HeadCheck
from server.http.large_body import LargeBody
from server.http.observe import Observed
from server.http.protocol import Connection, ServerState
from server.request.admission import Admission
from server.settings import HttpSettings, Settings
from tests.admission import limits
from tests.http_server import answer_ok, serving
from tests.media import reader

MIB = 1 << 20
WAIT_S = 0.5
PATIENCE_S = 30.0
SETTINGS = Settings(http=HttpSettings(max_request_bytes=3 * MIB, request_read_timeout_s=PATIENCE_S))
JSON = (b"content-type", b"application/json")
INVERTED = bytes(range(255, -1, -1))


def app_of(
    budget: ByteBudget,
    inner: ASGIApp = answer_ok,
    admission: Admission | None = None,
    settings: HttpSettings = SETTINGS.http,
) -> ASGIApp:
    """The layers of the server around an app that answers with the length of the body. With an
    `admission`, its requests need a permit."""
    admitted = () if admission is None else ("/x",)
    admission = admission or Admission(limits(wait_s=WAIT_S))
    app: ASGIApp = BodyReader(
        inner, settings, reader(), None, None, {}, budget, (), admission, admitted
    )
    return Observed(
        headers.SingleHeaders(app), server_timing=False, log_requests=False, traced=False
    )


@pytest.fixture
def budget() -> ByteBudget:
    return ByteBudget(4 * MIB, WAIT_S)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that may wait is given up after 1 s."""
    monkeypatch.setattr("server.http.byte_budget._PATIENCE", 2)


@pytest.fixture
def port(budget: ByteBudget) -> Iterator[int]:
    with serving(app_of(budget), SETTINGS) as port:
        yield port


def post_head(length: int | None, *more: tuple[bytes, bytes], path: bytes = b"/x") -> bytes:
    framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
    if b"content-type" not in [name.lower() for name, _ in more]:
        more = ((b"content-type", b"application/octet-stream"), *more)
    fields = b"".join(b"%s: %s\r\n" % field for field in more)
    line = b"POST %s HTTP/1.1\r\n" % path
    return line + b"host: a\r\n" + framing + b"\r\n" + fields + b"\r\n"


@contextlib.contextmanager
def begun(
    port: int, length: int | None, body: bytes = b"", *more: Any, path: bytes = b"/x"
) -> Iterator[socket.socket]:
    """A client that has sent the beginning of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(post_head(length, *more, path=path) + body)
        yield client


def answer(client: socket.socket) -> tuple[int, Any, Any]:
    """Status, headers and JSON body of the answer."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.headers, json.loads(response.read())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.usefixtures("_impatient")
def test_bodies_beyond_the_budget_are_refused_and_small_ones_are_not(
    port: int, budget: ByteBudget
) -> None:
    with begun(port, 2 * MIB) as first, begun(port, 2 * MIB):
        until(lambda: budget.held == 4 * MIB)
        with begun(port, MIB) as third:
            status, given, document = answer(third)
        assert (status, document["error"]["code"]) == (503, "body_memory_full")
        assert int(given["retry-after"]) >= 1
        with begun(port, 1000, bytes(1000)) as small:
            assert answer(small)[::2] == (200, 1000)
        first.sendall(bytes(2 * MIB))
        assert answer(first)[::2] == (200, 2 * MIB)
        until(lambda: budget.held == 2 * MIB)
    until(lambda: budget.held == 0)


def test_a_request_that_gets_no_permit_is_refused_before_its_body_arrives(
    budget: ByteBudget,
) -> None:
    app = app_of(budget, admission=Admission(limits(engine_requests=0)))
    with serving(app, SETTINGS) as port, begun(port, 2 * MIB) as client:
        status, given, document = answer(client)
        assert (status, document["error"]["code"]) == (503, "engine_queue_full")
        assert int(given["retry-after"]) >= 1
        assert budget.held == 0


def test_large_bodies_that_arrive_count_as_waiting_and_are_not_refused_later(
    budget: ByteBudget,
) -> None:
    gate = Admission(limits(running=1, waiting=1))
    app = app_of(budget, admission=gate)
    with serving(app, SETTINGS) as port, begun(port, MIB) as first, begun(port, MIB) as second:
        until(lambda: budget.held == 2 * MIB)
        with begun(port, MIB) as third:
            status, _, document = answer(third)
        assert (status, document["error"]["code"]) == (503, "server_busy")
        gate.slots.add("")  # another request was faster
        second.sendall(bytes(MIB))
        first.sendall(bytes(MIB))
        until(lambda: len(gate.slots.queue) == 2)  # more than may wait, but both were let in
        with begun(port, 1000, bytes(1000)) as small:
            assert answer(small)[0] == 503
        gate.end(1.0, lambda: gate.slots.free(""))
        assert [answer(client)[0] for client in (first, second)] == [200, 200]


def test_a_body_without_a_place_is_not_read_until_it_has_one() -> None:
    budget = ByteBudget(3 * MIB, PATIENCE_S)
    with serving(app_of(budget), SETTINGS) as port, begun(port, 3 * MIB) as first:
        until(lambda: budget.held == 3 * MIB)
        with begun(port, 3 * MIB) as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
            second.settimeout(1.0)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 3 * MIB:
                    sent += second.send(bytes(64 * 1024))
            assert sent < 3 * MIB  # the socket pushed back
            first.close()
            second.settimeout(PATIENCE_S)
            second.sendall(bytes(3 * MIB - sent))
            assert answer(second)[::2] == (200, 3 * MIB)
        until(lambda: budget.held == 0)


@pytest.mark.usefixtures("_impatient")
def test_chunked_bodies_take_shares_as_they_grow(port: int, budget: ByteBudget) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with begun(port, 3 * MIB):
        until(lambda: budget.held == 3 * MIB)
        with begun(port, None, chunk * 32) as chunked:
            assert answer(chunked)[0] == 503
        until(lambda: budget.held == 3 * MIB)
    until(lambda: budget.held == 0)
    with begun(port, None, chunk * 32 + b"0\r\n\r\n") as chunked:
        assert answer(chunked)[::2] == (200, 32 * 0x10000)
    until(lambda: budget.held == 0)


def test_a_client_that_leaves_frees_its_share(port: int, budget: ByteBudget) -> None:
    for _ in range(10):
        with begun(port, 3 * MIB, bytes(1000)):
            until(lambda: budget.held == 3 * MIB)
        until(lambda: budget.held == 0)


def test_waiting_bodies_get_their_shares_in_order() -> None:
    served: list[int] = []

    async def take(budget: ByteBudget, number: int, nbytes: int) -> None:
        await budget.take(nbytes)
        served.append(number)

    async def check() -> None:
        budget = ByteBudget(24, PATIENCE_S)
        await budget.take(24)
        async with asyncio.TaskGroup() as group:
            for number, nbytes in enumerate((3, 1, 2)):
                group.create_task(take(budget, number, nbytes))
            await asyncio.sleep(0)
            for nbytes, expected in ((2, []), (1, [0]), (1, [0, 1]), (2, [0, 1, 2])):
                budget.give_back(nbytes)  # the smaller ones do not overtake the first
                await asyncio.sleep(0.01)
                assert served == expected

    asyncio.run(check())


def test_a_body_is_refused_at_once_when_as_much_waits_as_there_is() -> None:
    budget = ByteBudget(4 * MIB, PATIENCE_S)
    with (
        serving(app_of(budget), SETTINGS) as port,
        begun(port, 3 * MIB),
        begun(port, 3 * MIB),
    ):
        until(lambda: budget.waiting == 1)
        with begun(port, 2 * MIB) as third:
            status, given, document = answer(third)
        assert (status, document["error"]["code"]) == (503, "body_memory_full")
        assert int(given["retry-after"]) >= 1
        assert budget.waiting == 1


@pytest.fixture
def refusing(budget: ByteBudget) -> Iterator[int]:
    """A server whose memory for bodies is taken; as many wait as may."""
    with (
        serving(app_of(budget), SETTINGS, budget) as port,
        begun(port, 3 * MIB),
        begun(port, 3 * MIB),
    ):
        until(lambda: budget.waiting == 1)
        yield port


def test_a_body_without_a_place_is_refused_by_its_head(refusing: int) -> None:
    def refused() -> float:
        return REGISTRY.get_sample_value("saccade_requests_total", {"outcome": "refused"}) or 0.0

    before = refused()
    with begun(refusing, 3 * MIB, b"", (b"X-Request-Id", b"mine")) as client:
        status, given, document = answer(client)
    assert (status, document["error"]["code"]) == (503, "body_memory_full")
    assert int(given["retry-after"]) >= 1
    assert given["x-request-id"] == "mine"
    assert given["connection"] == "close"  # the layers of the app let it stay open
    assert refused() == before + 1


def test_a_client_that_is_still_sending_gets_the_refusal(refusing: int) -> None:
    with begun(refusing, 3 * MIB, bytes(3 * MIB)) as client:
        assert answer(client)[0] == 503


def test_a_refusal_by_the_head_has_the_shape_of_its_api(refusing: int) -> None:
    with begun(refusing, 3 * MIB, b"", path=b"/v1/messages?beta=true") as client:
        document = answer(client)[2]
    assert (document["type"], document["error"]["type"]) == ("error", "overloaded_error")


REFUSED_WITH_ITS_BODY = post_head(150_000) + bytes(150_000)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[ServerState]:
    """What the connections of a server share, once for each connection."""
    found: list[ServerState] = []
    made = Connection.connection_made

    def noted(self: Connection, transport: Any) -> None:
        found.append(self.server_state)
        made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", noted)
    return found


def test_refused_connections_are_forgotten_when_they_are_closed(
    states: list[ServerState], refusing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_LINGER_PAUSE_S", 0.5)
    monkeypatch.setattr(protocol, "_LINGER_S", 0.1)
    for _ in range(100):
        with begun(refusing, 3 * MIB) as client:
            assert answer(client)[0] == 503
    until(lambda: states[0].lingering == 0)
    until(lambda: not states[0]._paused)  # one after the other would take most of a minute


@pytest.mark.parametrize(
    "sent",
    [
        REFUSED_WITH_ITS_BODY + b"no HTTP\r\n\r\n",
        REFUSED_WITH_ITS_BODY + b"GET /" + b"u" * 100_000 + b" HTTP/1.1\r\n\r\n",
        REFUSED_WITH_ITS_BODY * 2,
        post_head(150_000, (b"Connection", b"upgrade"), (b"Upgrade", b"websocket"))
        + bytes(150_000),
    ],
)
def test_a_connection_is_refused_once(sent: bytes, states: list[ServerState]) -> None:
    """Whatever comes with the request that is refused by its head."""
    budget = ByteBudget(4 * MIB, PATIENCE_S)
    with (
        serving(app_of(budget), SETTINGS, budget) as port,
        begun(port, 3 * MIB),
        begun(port, 3 * MIB),
    ):
        until(lambda: budget.waiting == 1)
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
                client.sendall(sent)
                received = b"".join(iter(functools.partial(client.recv, MIB), b""))
            assert received.startswith(b"HTTP/1.1 503 ")
            assert received.count(b"HTTP/1.1 ") == 1
        until(lambda: states[0].lingering == 0)


def test_small_bodies_and_pages_of_other_sites_reach_the_app(refusing: int) -> None:
    with begun(refusing, 1000, bytes(1000)) as client:
        assert answer(client)[::2] == (200, 1000)
    with begun(refusing, 3 * MIB, b"", (b"Origin", b"http://page")) as client:
        status, given, _ = answer(client)
    assert status == 503
    assert "connection" not in given


def test_a_body_for_another_process_takes_no_place_here(budget: ByteBudget) -> None:
    async def passing_on(scope: Any, receive: Any, send: Any) -> None:
        await (answer_ok if scope["path"] == "/v1/files" else app_of(budget))(scope, receive, send)

    with (
        serving(passing_on, SETTINGS, budget, is_passed_on="/v1/files".__eq__) as port,
        begun(port, 3 * MIB),
        begun(port, 3 * MIB),
    ):
        until(lambda: budget.waiting == 1)
        with begun(port, MIB, bytes(MIB), path=b"/v1/files?x=1") as client:
            assert answer(client)[::2] == (200, MIB)


def test_while_the_rate_is_unknown_only_a_quarter_of_the_budget_may_wait() -> None:
    async def check() -> None:
        budget = ByteBudget(4 * MIB, PATIENCE_S)
        await budget.take(4 * MIB)
        waiting = asyncio.create_task(budget.take(MIB))
        await asyncio.sleep(0)
        with pytest.raises(BodyMemoryFull):
            await budget.take(1)
        budget.give_back(MIB)
        await waiting

    asyncio.run(check())


def test_a_body_is_refused_at_once_when_it_would_wait_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes become free at one MiB per second, so that two would take more than the limit."""

    async def check() -> None:
        now = 0.0
        clock = SimpleNamespace(monotonic=lambda: now)
        monkeypatch.setattr("server.request.admission.time", clock)
        budget = ByteBudget(100 * MIB, wait_timeout_s=1.5)
        await budget.take(100 * MIB)
        waiting = [asyncio.create_task(budget.take(MIB)) for _ in range(25)]
        await asyncio.sleep(0)
        for _ in range(25):
            now += 1.0
            budget.give_back(MIB)
        await asyncio.gather(*waiting)
        await asyncio.wait_for(budget_turn(budget, MIB), PATIENCE_S)  # one: it may wait
        with pytest.raises(BodyMemoryFull) as caught:
            await budget.take(2 * MIB)
        assert caught.value.retry_after_s == 1
        with pytest.raises(BodyMemoryFull) as caught:
            await budget.take(20 * MIB)
        assert caught.value.retry_after_s in (18, 19)

    async def budget_turn(budget: ByteBudget, nbytes: int) -> None:
        turn = asyncio.create_task(budget.take(nbytes))
        await asyncio.sleep(0)
        budget.give_back(nbytes)
        await turn

    asyncio.run(check())


def test_a_few_tasks_have_their_turn_in_each_iteration_of_the_event_loop() -> None:
    passed: list[int] = []

    async def pass_twice(turns: Turns, number: int) -> None:
        await turns.next()
        passed.append(number)
        await turns.next()
        passed.append(number)

    async def check() -> None:
        turns = Turns(2)
        tasks = [asyncio.create_task(pass_twice(turns, number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        most, before = 0, 0
        for _ in range(20):
            before = len(passed)
            await asyncio.sleep(0)
            most = max(most, len(passed) - before)
        assert most == 2
        assert all(task.done() for task in tasks)

    asyncio.run(check())
    assert sorted(passed) == [0, 0, 1, 1, 3, 3, 4, 4]
    assert list(dict.fromkeys(passed)) == [0, 1, 3, 4]


def test_clients_that_connect_are_heard_before_many_requests_begin(budget: ByteBudget) -> None:
    async def check() -> None:
        begun, passed = Turns(8), list[int]()

        async def begin(number: int) -> None:
            await begun.next()
            passed.append(number)

        HeadCheck(budget, MIB, begun=begun).note_arrival()
        tasks = [asyncio.create_task(begin(number)) for number in range(8)]
        await asyncio.sleep(0)
        assert passed == [0]
        await asyncio.gather(*tasks)

    asyncio.run(check())


POST = (b"POST", b"/x")


def test_bodies_that_are_let_in_count_from_their_heads_on(budget: ByteBudget) -> None:
    heads = HeadCheck(budget, 8 * MIB)

    def decide(nbytes: int) -> Expected | SaccadeError | None:
        return heads.decide(*POST, [(b"content-length", str(nbytes).encode())])

    expected = [decide(3 * MIB), decide(2 * MIB)]  # the second one may wait
    assert isinstance(decide(2 * MIB), BodyMemoryFull)
    assert decide(1000) is None
    for each in expected:
        assert isinstance(each, Expected)
        each.end()
        each.end()
    assert isinstance(decide(2 * MIB), Expected)


def test_a_body_that_was_let_in_may_wait_for_its_share(budget: ByteBudget) -> None:
    async def check() -> None:
        await budget.take(4 * MIB)
        takes = [budget.take(3 * MIB, was_let_in=True) for _ in range(2)]
        waiting = [asyncio.create_task(each) for each in takes]
        await asyncio.sleep(0)
        assert budget.waiting == 2
        with pytest.raises(BodyMemoryFull):
            await budget.take(3 * MIB)
        budget.give_back(4 * MIB)
        await waiting[0]
        budget.give_back(3 * MIB)
        await waiting[1]

    asyncio.run(check())


@pytest.mark.parametrize("end", ["answer", "leave"])
def test_a_body_that_is_never_read_is_expected_no_longer(budget: ByteBudget, end: str) -> None:
    asyncio.run(budget.take(4 * MIB))  # one body may wait, and no other then
    asked, refused = threading.Event(), []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        refused.append(budget.refusal(2 * MIB))
        asked.set()
        if end == "answer":
            await answer_ok(scope, _nothing, send)
        else:
            await asyncio.sleep(0.01)

    with serving(inner, SETTINGS, budget) as port:
        with begun(port, 2 * MIB) as client:
            assert asked.wait(PATIENCE_S)
            if end == "answer":
                assert answer(client)[0] == 200
        until(lambda: budget.refusal(2 * MIB) is None)
        assert refused[0] is not None


def test_a_post_request_begins_no_websocket_and_its_body_is_expected_no_longer(
    budget: ByteBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A websocket would take over the connection, whose limits in time are not for it."""
    asyncio.run(budget.take(4 * MIB))
    expected, expect = [], budget.expect

    def noted(nbytes: int) -> Expected:
        expected.append(expect(nbytes))
        return expected[-1]

    monkeypatch.setattr(budget, "expect", noted)
    upgrade = (b"Connection", b"upgrade"), (b"Upgrade", b"websocket")
    with (
        serving(app_of(budget), SETTINGS, budget) as port,
        begun(port, 2 * MIB, b"", *upgrade) as client,
    ):
        until(lambda: len(expected) == 1)
        until(lambda: budget.refusal(2 * MIB) is None)
        status, _, body = answer(client)
        assert (status, body["error"]["code"]) == (400, "invalid_request")


async def _nothing() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def test_tasks_give_way_to_other_work() -> None:
    passed: list[int] = []

    async def pass_often(turns: Turns, number: int) -> None:
        while True:
            await turns.next()
            passed.append(number)

    async def check() -> None:
        turns = Turns(4)
        tasks = [asyncio.create_task(pass_often(turns, number)) for number in range(8)]
        for _ in range(5):
            await asyncio.sleep(0)
        turns.give_way()
        await asyncio.sleep(0)  # those that have their turn already pass
        before, most = len(passed), 0
        iterations, deadline = 0, time.monotonic() + PATIENCE_S
        while len(passed) < before + 3 and time.monotonic() < deadline:
            turns.give_way()
            now = len(passed)
            await asyncio.sleep(0)
            iterations, most = iterations + 1, max(most, len(passed) - now)
        assert most == 1
        assert len(passed) == before + 3  # and all the same go on
        assert iterations > 20  # but not in each
        for task in tasks:
            task.cancel()

    asyncio.run(check())


def test_a_body_that_trickles_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.body._RATE_GRACE_S", 0.5)
    app = app_of(ByteBudget(4 * MIB, WAIT_S))
    with serving(app, SETTINGS) as port, begun(port, MIB) as client:
        client.settimeout(0.1)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            client.sendall(b"x" * 100)
            with contextlib.suppress(TimeoutError):
                client.recv(1, socket.MSG_PEEK)
                break
        client.settimeout(PATIENCE_S)
        status, _, document = answer(client)
        assert (status, document["error"]["code"]) == (408, "request_timeout")


def test_a_silent_body_is_refused_soon_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes too late to wake the reader does not begin the time anew by much."""
    asked: list[float] = []
    pieces = LargeBody.pieces

    async def noted(self: LargeBody, wait_s: float) -> list[bytes]:
        asked.append(wait_s)
        return await pieces(self, wait_s)

    monkeypatch.setattr(LargeBody, "pieces", noted)
    impatient = HttpSettings(max_request_bytes=3 * MIB, request_read_timeout_s=0.4)
    app = app_of(ByteBudget(4 * MIB, WAIT_S), settings=impatient)
    with serving(app, SETTINGS) as port, begun(port, 2 * MIB, bytes(MIB)) as client:
        status, _, document = answer(client)
    assert (status, document["error"]["code"]) == (408, "request_timeout")
    assert max(asked) == 0.1


def test_a_request_that_is_cut_off_leaves_no_traceback(
    budget: ByteBudget, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    logged = logging.getLogger("uvicorn.error")
    with serving(app_of(budget, hang), SETTINGS, shutdown_timeout=0.1) as port:
        logged.addHandler(caplog.handler)  # uvicorn's loggers do not propagate
        client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        client.sendall(post_head(3) + b"abc")
        time.sleep(0.2)
    logged.removeHandler(caplog.handler)
    with client:
        status, _, document = answer(client)
    assert (status, document["error"]["code"]) == (503, "server_busy")
    assert not [record for record in caplog.records if record.exc_info]


# ---------------------------------------------------------------------- large bodies


async def answer_digest(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers with a hash of the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answered = json.dumps(hashlib.sha256(body).hexdigest()).encode()
    length = (b"content-length", b"%d" % len(answered))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": answered})


@pytest.mark.parametrize("past_uvicorn", [True, False])
def test_large_bodies_arrive_as_they_were_sent_on_kept_and_pipelined_connections(
    past_uvicorn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not past_uvicorn:
        monkeypatch.setattr("server.http.protocol._MAX_LARGE_BODIES", 0)
    budget = ByteBudget(16 * MIB, PATIENCE_S)
    bodies = [os.urandom(size) for size in (MIB, 3 * MIB, 3 * MIB - 1, 300_000, 5)]
    with serving(app_of(budget, answer_digest), SETTINGS) as port:
        for pause_s in (0.0, 0.02):
            with begun(port, len(bodies[0])) as client:
                sender = threading.Thread(target=send_slowly, args=(client, bodies, pause_s))
                sender.start()
                received = b"".join(iter(functools.partial(client.recv, MIB), b""))
                sender.join()
            assert re.findall(rb'"([0-9a-f]{64})"', received) == [
                hashlib.sha256(body).hexdigest().encode() for body in (*bodies, b"")
            ]
        until(lambda: budget.held == 0)


def test_middleware_that_changes_bodies_sees_all_of_large_ones() -> None:
    budget = ByteBudget(16 * MIB, PATIENCE_S)
    reads = app_of(budget, answer_digest)
    assert isinstance(reads, Observed)
    inner = reads._app

    async def inverting(scope: Any, receive: Any, send: Any) -> None:
        async def changed() -> Any:
            message = await receive()
            return {**message, "body": message.get("body", b"").translate(INVERTED)}

        await inner(scope, changed, send)

    reads._app = inverting
    body = os.urandom(2 * MIB)
    with serving(reads, SETTINGS) as port, begun(port, len(body)) as client:
        client.sendall(body)
        digest = hashlib.sha256(body.translate(INVERTED)).hexdigest()
        assert answer(client)[::2] == (200, digest)


def send_slowly(client: socket.socket, bodies: list[bytes], pause_s: float) -> None:
    """Send a request for each body, without waiting for answers. The head of the first is sent."""
    data = bodies[0] + b"".join(post_head(len(body)) + body for body in bodies[1:])
    data += post_head(0, (b"connection", b"close"))
    for at in range(0, len(data), 400_000):
        client.sendall(data[at : at + 400_000])
        time.sleep(pause_s)


def test_more_large_bodies_than_are_read_past_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.protocol._MAX_LARGE_BODIES", 2)
    budget = ByteBudget(16 * MIB, PATIENCE_S)
    with serving(app_of(budget), SETTINGS) as port, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(begun(port, 2 * MIB, bytes(MIB // 2 + number)))
            for number in range(5)
        ]
        until(lambda: budget.held == 10 * MIB)
        for number, client in enumerate(clients):
            client.sendall(bytes(2 * MIB - MIB // 2 - number))
        for client in clients:
            assert answer(client)[::2] == (200, 2 * MIB)


def test_a_connection_is_of_use_after_a_body_that_was_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest of the body that was refused is not taken for a request."""
    monkeypatch.setattr("server.http.body._CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr("server.http.body._RATE_GRACE_S", 0.2)
    fast = HttpSettings(max_request_bytes=3 * MIB, request_min_bytes_per_s=100 * MIB)
    app = app_of(ByteBudget(4 * MIB, WAIT_S), settings=fast)
    with serving(app, SETTINGS) as port, begun(port, 2 * MIB, bytes(MIB)) as client:
        status, _, document = answer(client)
        assert (status, document["error"]["code"]) == (408, "request_timeout")
        client.sendall(bytes(MIB) + post_head(5) + b"12345")
        assert answer(client)[::2] == (200, 5)


def test_a_client_that_leaves_in_the_middle_of_a_large_body_frees_its_share(
    port: int, budget: ByteBudget
) -> None:
    for _ in range(10):
        with begun(port, 3 * MIB, bytes(2 * MIB)):
            until(lambda: budget.held == 3 * MIB)
        until(lambda: budget.held == 0)


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 9000}]},
         "messages[0].content"),
        ({"messages": [{}] * 20_000}, "messages"),
        ({"tools": [{"type": "function"}] * 20_000}, "tools"),
        ({"prompt": [1] * 310_000}, None),
    ],
)  # fmt: skip
def test_a_body_of_too_many_items_is_refused(port: int, document: Any, param: str | None) -> None:
    body = json.dumps(document, separators=(",", ":")).encode()
    with begun(port, len(body), body, JSON) as client:
        status, _, answered = answer(client)
    error = answered["error"]
    assert (status, error["code"], error["param"]) == (400, "request_too_complex", param)


# ---------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "name",
    [
        b"Content-Type",
        b"host",
        b"AUTHORIZATION",
        b"X-Api-Key",
        b"X-Request-Id",
        b"X-Request-Timeout",
    ],
)
def test_a_header_that_must_be_single_may_not_be_repeated(port: int, name: bytes) -> None:
    twice = ((name, b"application/json"), (name, b"text/plain"))
    with begun(port, 2, b"{}", *twice) as client:
        status, _, document = answer(client)
    assert (status, document["error"]["code"]) == (400, "invalid_request")
    assert name.decode().lower() in document["error"]["message"]


@pytest.mark.parametrize("more", [(), ((b"Origin", b"http://page"),)])
def test_a_length_may_begin_with_zeros(port: int, more: tuple[tuple[bytes, bytes], ...]) -> None:
    lengths = b"content-length: " + b"0" * 5000 + b"5"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(post_head(5, *more).replace(b"content-length: 5", lengths) + b"12345")
        assert answer(client)[::2] == (200, 5)


def test_other_headers_may_be_repeated(port: int) -> None:
    twice = ((b"Accept", b"a/b"), (b"Accept", b"c/d"), (b"X-Forwarded-For", b"::1"))
    with begun(port, 2, b"{}", JSON, *twice, (b"X-Forwarded-For", b"::2")) as client:
        assert answer(client)[::2] == (200, 2)
