"""The client against a web server that fails as servers and proxies do."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from saccade_client import AsyncClient, Client, Conversation, errors
from tests import pictures

PHOTO = pictures.encode(pictures.photo((1200, 900)), "JPEG", quality=95)
ANSWER = {
    "id": "1",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}],
}


@dataclass
class Reply:
    """A response; `status` 0 closes the connection without one. `after_s` is the time before it."""

    status: int = 200
    body: Any = field(default_factory=lambda: ANSWER)
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0


@dataclass
class Server:
    """Gives `replies` in turn to questions, then answers; `requests` are (path, headers, body).
    Its version is first given as `versions` say."""

    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    versions: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    """As plain vLLM: it has models, and a version without `saccade`."""
    server = Server()
    others = {
        "/v1/models": {"data": [{"id": "m"}]},
        "/version": {"version": "0.1"},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve(b"")

        def do_POST(self) -> None:
            self._serve(self.rfile.read(int(self.headers["Content-Length"])))

        def _serve(self, body: bytes) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append((self.path, headers, json.loads(body or "null")))
            if self.path == "/version" and server.versions:
                return self._send(server.versions.pop(0))
            if self.path in others:
                return self._send(Reply(body=others[self.path]))
            server.times.append(time.monotonic())
            return self._send(server.replies.pop(0) if server.replies else Reply())

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.after_s)
            if not reply.status:
                return
            body = reply.body
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(data))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client waits no longer
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        server.url = f"http://127.0.0.1:{serving.server_address[1]}/v1"
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        serving.shutdown()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, "sk-1", timeout_s=30) as made:
        yield made


def error(code: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": "no", "code": code, "type": "t", "param": "p", **more}}


# ---------------------------------------------------------------------- attempts


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504])
def test_transient_failures_are_tried_again(server: Server, client: Client, status: int) -> None:
    server.replies = [Reply(status, error("x"))]
    assert client.ask("?").text == "yes"
    assert server.paths.count("/v1/chat/completions") == 2


def test_retry_after_is_honoured(server: Server, client: Client) -> None:
    server.replies = [Reply(503, error("server_busy"), {"Retry-After": "1"})]
    assert client.ask("?").text == "yes"
    first, second = server.times
    assert 1 <= second - first < 3


def test_the_event_loop_is_free_during_a_wait(server: Server) -> None:
    server.replies = [Reply(429, error("x"), {"Retry-After": "1"})]

    async def ask() -> int:
        ticks = 0
        async with AsyncClient(server.url) as client:
            asking = asyncio.ensure_future(client.ask("?"))
            while not asking.done():
                await asyncio.sleep(0.05)
                ticks += 1
            assert (await asking).text == "yes"
        return ticks

    assert asyncio.run(ask()) > 10


@pytest.mark.parametrize(
    ("reply", "attempts"),
    [
        (Reply(400, error("invalid_image")), 1),
        (Reply(429, error("insufficient_quota")), 1),
        (Reply(503, error("x"), {"Retry-After": "86400"}), 1),
        (Reply(503, error("x")), 3),
    ],
)
def test_other_failures_are_not_tried_again_without_end(
    server: Server, reply: Reply, attempts: int
) -> None:
    server.replies = [reply] * 10
    with Client(server.url, retries=2) as client, pytest.raises(errors.ApiError):
        client.ask("?")
    assert server.paths.count("/v1/chat/completions") == attempts


@pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
def test_the_time_to_come_back_may_be_a_date(zone: str) -> None:
    for year, is_later in ((2015, False), (2222, True)):
        headers = {"retry-after": f"Wed, 21 Oct {year} 07:28:00 {zone}"}
        found = errors.api_error(503, b"", headers).retry_after_s
        assert found is not None
        assert (found > 0) == is_later


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequest),
        (401, errors.NotAuthorized),
        (403, errors.NotAuthorized),
        (404, errors.NotFound),
        (408, errors.DeadlineExceeded),
        (413, errors.TooLarge),
        (422, errors.InvalidRequest),
        (429, errors.RateLimited),
        (500, errors.ServerError),
        (503, errors.ServerBusy),
    ],
)
def test_each_status_has_its_error(
    server: Server, status: int, kind: type[errors.ApiError]
) -> None:
    headers = {"X-Request-Id": "r1", "Retry-After": "7"}
    server.replies = [Reply(status, error("c"), headers)]
    with Client(server.url, retries=0) as client, pytest.raises(kind) as caught:
        client.ask("?")
    found = caught.value
    assert type(found) is kind
    assert (found.status, found.code, found.param) == (status, "c", "p")
    assert (found.request_id, found.retry_after_s) == ("r1", 7)
    assert str(found) == f"no (at p) [{status} c]"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "the server answered with status 400"),
        ([1], "the server answered with status 400"),
        ({"error": "why"}, "why"),
        ({"message": "why"}, "why"),
        ({"error": {"message": None}}, "the server answered with status 400"),
    ],
)
def test_errors_of_other_servers_have_a_message(
    server: Server, client: Client, body: Any, message: str
) -> None:
    server.replies = [Reply(400, body)]
    with pytest.raises(errors.InvalidRequest) as caught:
        client.ask("?")
    assert caught.value.message == message


@pytest.mark.parametrize("body", ["<html>", [1], {}, {"choices": 1}])
def test_an_answer_in_another_form_is_an_error(server: Server, client: Client, body: Any) -> None:
    server.replies = [Reply(200, body)]
    with pytest.raises(errors.UnexpectedAnswer):
        client.ask("?")


def test_a_late_answer_is_an_error(server: Server) -> None:
    server.replies = [Reply(after_s=4)]
    with Client(server.url, timeout_s=1, model="m") as client, pytest.raises(errors.TimedOut):
        client.ask("?")
    assert server.requests[-1][1]["x-request-timeout"] == "1"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://nowhere.invalid/v1", "nonsense"])
def test_a_server_that_cannot_be_reached_is_an_error(url: str) -> None:
    with Client(url, retries=0) as client, pytest.raises(errors.ConnectionFailed):
        client.ask("?")


# ---------------------------------------------------------------------- streams


def events(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


STREAM = {"Content-Type": "text/event-stream"}


def test_a_stream_gives_text_and_then_the_answer(server: Server, client: Client) -> None:
    end = {"choices": [], "usage": {"prompt_tokens": 3}, "error": None}
    body = ": a comment\n\n" + events(piece("a"), piece(" b"), end) + "data: [DONE]\n\n"
    server.replies = [Reply(503, error("x")), Reply(200, body, STREAM)]
    conversation = Conversation()
    stream = client.stream("?", conversation=conversation)
    with pytest.raises(errors.SaccadeError):
        _ = stream.answer
    assert list(stream) == ["a", " b"]
    assert stream.answer.text == "a b"
    assert stream.answer.usage is not None
    assert stream.answer.usage.prompt_tokens == 3
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_a_stream_gives_all_of_its_chunks(server: Server, client: Client) -> None:
    def choice(index: int, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": finish_reason}

    def call(number: int, **function: Any) -> dict[str, Any]:
        return {"index": number, "type": "function", "function": function}

    chunks = [
        {"id": "1", "model": "m", "choices": [choice(0, role="assistant", content="")]},
        {"id": "1", "choices": [choice(0, reasoning="so"), choice(1, content="x")]},
        {"id": "1", "choices": [choice(0, content="a", reasoning="!"), choice(1, content="y")]},
        {"id": "1", "choices": [choice(0, tool_calls=[{"id": "c", **call(0, name="f")}])]},
        {"id": "1", "choices": [choice(0, tool_calls=[call(0, arguments='{"b"')])]},
        {"id": "1", "choices": [choice(0, tool_calls=[call(0, arguments=": 1}")])]},
        {"id": "1", "choices": [choice(0, "tool_calls"), choice(1, "length")]},
        {"id": "1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    ]
    body = events(*chunks) + "data: [DONE]\n\n"
    server.replies = [Reply(200, body, STREAM)] * 3
    talk = Conversation()
    stream = client.stream("?", conversation=talk)
    found = list(stream.chunks())
    assert [chunk.text for chunk in found] == ["", "", "a", "", "", "", "", ""]
    assert [chunk.finish_reason for chunk in found] == [None] * 6 + ["tool_calls", None]
    assert found[1].choices[0].delta.model_extra == {"reasoning": "so"}
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 9
    first, second = stream.answer.choices
    assert (first.message.content, first.finish_reason) == ("a", "tool_calls")
    assert first.message.model_extra == {"reasoning": "so!"}
    function = {"name": "f", "arguments": '{"b": 1}'}
    assert first.message.tool_calls == [{"id": "c", "type": "function", "function": function}]
    said = {"role": "assistant", "content": "a", "tool_calls": first.message.tool_calls}
    assert talk.messages[1:] == [said]
    assert (second.message.content, second.finish_reason) == ("xy", "length")
    assert second.message.tool_calls is None
    assert list(client.stream("?")) == ["a"]

    async def ask_async() -> None:
        async with AsyncClient(server.url) as client:
            stream = await client.stream("?")
            assert [chunk async for chunk in stream.chunks()] == found
            assert [each.message.content for each in stream.answer.choices] == ["a", "xy"]

    asyncio.run(ask_async())


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (events(piece("a")), errors.ConnectionLost),
        (events(piece("a"), {"error": {"message": "no", "code": 503}}), errors.ServerBusy),
        (events(piece("a"), error("deadline_exceeded")), errors.ApiError),
        (events(piece("a")) + "data: {\n\n", errors.UnexpectedAnswer),
        (events(piece("a"), [1]), errors.UnexpectedAnswer),
        (events(piece("a"), {"choices": [{"delta": 1}]}), errors.UnexpectedAnswer),
    ],
)
def test_a_stream_that_fails_is_an_error(
    server: Server, body: str, kind: type[errors.SaccadeError]
) -> None:
    server.replies = [Reply(200, body, STREAM)] * 2
    got: list[str] = []

    def ask() -> None:
        with Client(server.url) as client:
            for text in client.stream("?"):
                got.append(text)  # noqa: PERF402 - keeps what came before the failure

    async def ask_async() -> None:
        async with AsyncClient(server.url) as client:
            async for text in await client.stream("?"):
                got.append(text)  # noqa: PERF401

    with pytest.raises(kind):
        ask()
    with pytest.raises(kind):
        asyncio.run(ask_async())
    assert got == ["a", "a"]


def test_a_call_that_waits_for_the_answer_does_not_stream(server: Server, client: Client) -> None:
    assert client.ask("?", stream=False).text == "yes"
    assert "stream" not in server.requests[-1][2]
    with pytest.raises(errors.SaccadeError, match="stream"):
        client.ask("?", stream=True)


# ---------------------------------------------------------------------- other servers


def test_other_servers_are_asked_for_nothing_of_ours(server: Server, client: Client) -> None:
    answer = client.ask("?", PHOTO)
    path, headers, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert set(body) == {"model", "messages"}
    (image, _) = body["messages"][0]["content"]
    assert image == pictures.image_part(PHOTO) | {
        "image_url": {"url": pictures.data_url(PHOTO, "image/jpeg")}
    }
    assert headers["authorization"] == "Bearer sk-1"
    assert [(shown.width, shown.height) for shown in answer.images] == [(1200, 900)]
    assert sorted(server.paths) == ["/v1/chat/completions", "/v1/models", "/version"]


def test_a_conversation_has_one_session(server: Server, client: Client) -> None:
    conversation = Conversation(system="be brief")
    client.ask("?", PHOTO, conversation=conversation)
    client.ask("and?", conversation=conversation)
    client.ask("?", PHOTO)
    client.ask("?", pictures.encode(pictures.shape("red")))
    asked = [r for r in server.requests if r[0] == "/v1/chat/completions"]
    sessions = [headers["x-session-id"] for _, headers, _ in asked]
    assert sessions == [headers["x-smg-routing-key"] for _, headers, _ in asked]
    assert sessions[0] == hashlib.sha256(PHOTO).hexdigest()[:32]
    assert sessions[0] == sessions[1] == sessions[2] != sessions[3]
    roles = [message["role"] for message in asked[1][2]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_a_request_without_pictures_has_no_session(server: Server, client: Client) -> None:
    client.ask("?")
    headers = server.requests[-1][1]
    assert not {"x-session-id", "x-smg-routing-key"} & set(headers)


@pytest.mark.parametrize("name", ["x-session-id", "X-SMG-Routing-Key"])
def test_the_callers_session_wins(server: Server, name: str) -> None:
    with Client(server.url, model="m", headers={name: "mine"}) as client:
        client.ask("?", PHOTO)
    headers = server.requests[-1][1]
    assert (headers["x-session-id"], headers["x-smg-routing-key"]) == ("mine", "mine")


@pytest.mark.parametrize(("status", "asked"), [(503, 2), (429, 2), (404, 1)])
def test_a_busy_server_is_asked_again_what_it_is(server: Server, status: int, asked: int) -> None:
    server.versions = [Reply(status)]
    with Client(server.url, retries=0) as client:
        for _ in range(2):
            client.ask("?", PHOTO)
    assert server.paths.count("/version") == asked


def test_a_failed_question_is_no_part_of_the_conversation(server: Server, client: Client) -> None:
    conversation = Conversation()
    server.replies = [Reply(400, error("x"))]
    with pytest.raises(errors.InvalidRequest):
        client.ask("?", conversation=conversation)
    assert conversation.messages == []


@pytest.mark.parametrize("asking", [Client.ask, Client.stream])
def test_openai_is_not_asked_what_it_is(asking: Callable[..., Any]) -> None:
    with Client("https://api.openai.com/v1") as client, pytest.raises(errors.SaccadeError) as no:
        asking(client, "?", PHOTO)
    assert "name a model" in str(no.value)
