"""Responses outside the routes: errors, kept connections, and requests whose client disconnected.

A real uvicorn serves a small app behind the outermost layer, without an engine.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.testclient import TestClient
from pydantic import BaseModel, field_validator

from server.errors import ImageTooLarge, ServerBusy
from server.http import errors
from server.http.fail_fast import stop_at_first_error
from server.http.observe import Observed
from server.http.stream import EventStream
from server.settings import Settings
from server.telemetry import metrics
from tests.http_server import serving

SECRET = "/srv/secret.py"
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens")
ended: list[str] = []


class _Text(BaseModel):
    type: str
    text: str


class _Body(BaseModel):
    case: str = ""

    @field_validator("case", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        return value.strip()  # as some of vLLM's validators do, for any type

    content: str | list[_Text] = ""


async def answer(body: _Body) -> Response:
    match body.case:
        case "raises":
            raise RuntimeError(SECRET)
        case "image":
            raise ImageTooLarge("the image is too large", param="messages[0].content[0]")
        case "busy":
            raise ServerBusy("too many images wait")
        case "vllm 500":
            error = {"message": SECRET, "type": "InternalServerError", "param": None, "code": 500}
            return JSONResponse({"error": error}, status_code=500)
        case "vllm 404":
            error = {"message": "no such model", "type": "NotFoundError", "code": 404}
            return JSONResponse({"error": error}, status_code=404)
        case "scaling":
            return JSONResponse({"error": "the model is scaling"}, status_code=503)
        case "quota":
            raise HTTPException(429, "too many")
        case "fails" | "endless" | "openai stream" | "anthropic stream":
            return EventStream(events(body.case), lambda: ended.append(body.case))
        case "waits":
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("waits")
    return JSONResponse({"usage": {}})


async def events(case: str) -> AsyncGenerator[str, None]:
    yield 'data: {"choices":[]}\n\n'
    await asyncio.sleep(0)
    if case == "fails":
        raise RuntimeError(SECRET)
    if case == "endless":
        await asyncio.sleep(60)
    if case == "openai stream":
        yield 'data: {"choices":[]}\n\n'
        yield (
            f'data: {{"error": {{"message": "{SECRET}", "type": "InternalServerError", '
            '"param": null, "code": 500}}\n\n'
        )
        yield "data: [DONE]\n\n"
    else:
        error = f'{{"type":"error","error":{{"type":"internal_error","message":"{SECRET}"}}}}'
        yield f"event: error\ndata: {error}\n\n"


async def passes(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """A user's middleware, as `--middleware` adds it."""
    return await call_next(request)


@contextlib.contextmanager
def running(
    *, with_middleware: bool = False, request_timeout_s: float | None = None
) -> Iterator[str]:
    app = FastAPI()
    for path in PATHS:
        app.post(path)(answer)
    errors.add_error_handlers(app)
    if with_middleware:
        app.middleware("http")(passes)
    observed = Observed(
        app,
        server_timing=True,
        log_requests=False,
        traced=False,
        aborted=PATHS,
        request_timeout_s=request_timeout_s,
        streams_directly=not with_middleware,
    )
    with serving(observed, Settings()) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as url:
        yield url


def ask(url: str, case: str, path: str = PATHS[0], **headers: str) -> httpx.Response:
    return httpx.post(url + path, json={"case": case}, headers={"X-Request-Id": "r-1", **headers})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["raises", "vllm 500"])
def test_an_internal_error_keeps_the_connection_and_hides_its_text(
    url: str, case: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    sockets = []
    with caplog.at_level(logging.ERROR, "saccade"):
        for name in ("r-1", "r-2", "r-3"):
            headers = {"Content-Type": "application/json", "X-Request-Id": name}
            connection.request("POST", path, json.dumps({"case": case}), headers)
            sockets.append(connection.sock)
            response = connection.getresponse()
            body = response.read()
            assert (response.status, response.headers["X-Request-Id"]) == (500, name)
            assert response.headers["Connection"] is None
            error = json.loads(body)["error"]
            assert (error["message"], error["code"]) == ("internal error", "internal_error")
            assert SECRET.encode() not in body
        until(lambda: "r-3" in caplog.text)  # it may be logged after the response
    assert sockets[0] is sockets[1] is sockets[2]
    assert all(name in caplog.text for name in ("r-1", "r-2", "r-3"))
    assert SECRET in caplog.text
    connection.close()


INTERNAL = {
    "message": "internal error",
    "type": "server_error",
    "param": None,
    "code": "internal_error",
}


def test_a_failing_stream_ends_with_an_error_event(url: str) -> None:
    first, error, done, *_ = ask(url, "fails").text.split("\n\n")
    assert first == 'data: {"choices":[]}'
    assert json.loads(error.removeprefix("data: ")) == {"error": INTERNAL}
    assert done == "data: [DONE]"
    assert "fails" in ended


def test_a_failing_stream_of_anthropics_api_ends_with_its_error_event(url: str) -> None:
    _, error, *rest = ask(url, "fails", PATHS[1]).text.split("\n\n")
    name, _, data = error.partition("\ndata: ")
    assert name == "event: error"
    assert json.loads(data)["error"]["type"] == "api_error"
    assert not any("[DONE]" in event for event in rest)


# ---------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("path", PATHS)
def test_work_ends_at_the_deadline_that_the_client_set(url: str, path: str) -> None:
    ended.clear()
    answer = ask(url, "waits", path, **{"X-Request-Timeout": "0.2"})
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert ended == ["waits"]


def test_a_stream_ends_at_the_deadline_with_an_error_event(url: str) -> None:
    ended.clear()
    answer = ask(url, "endless", **{"X-Request-Timeout": "0.2"})
    assert answer.status_code == 200
    first, error, done, *_ = answer.text.split("\n\n")
    assert first == 'data: {"choices":[]}'
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert done == "data: [DONE]"
    assert ended == ["endless"]


@pytest.mark.parametrize("given", ["", "soon", "-1", "nan", "1e9"])
def test_a_deadline_that_is_no_number_of_seconds_is_ignored(url: str, given: str) -> None:
    assert ask(url, "", **{"X-Request-Timeout": given}).status_code == 200


def test_a_client_cannot_ask_for_more_than_the_limit_of_the_server() -> None:
    with running(request_timeout_s=0.2) as url:
        for headers in ({}, {"X-Request-Timeout": "30"}):
            assert ask(url, "waits", **headers).json()["error"]["code"] == "deadline_exceeded"


def test_an_error_in_a_stream_has_openais_shape(url: str) -> None:
    lines = ask(url, "openai stream").text.split("\n\n")
    assert lines[0] == lines[1] == 'data: {"choices":[]}'
    assert json.loads(lines[2].removeprefix("data: ")) == {"error": INTERNAL}
    assert lines[3] == "data: [DONE]"


# ---------------------------------------------------------------------- dialects

ANTHROPIC = [
    ("image", 413, "request_too_large", "image_too_large"),
    ("busy", 503, "overloaded_error", "server_busy"),
    ("raises", 500, "api_error", "internal_error"),
    ("vllm 404", 404, "not_found_error", "not_found"),
    ("scaling", 503, "overloaded_error", "server_busy"),
    ("quota", 429, "rate_limit_error", "rate_limit_exceeded"),
]


@pytest.mark.parametrize(("case", "status", "kind", "code"), ANTHROPIC)
@pytest.mark.parametrize("path", PATHS[1:])
def test_errors_of_the_messages_routes_have_anthropics_shape(
    url: str, case: str, status: int, kind: str, code: str, path: str
) -> None:
    answer = ask(url, case, path)
    document = answer.json()
    assert answer.status_code == status
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert document.keys() == {"type", "error", "request_id"}
    assert (document["type"], document["request_id"]) == ("error", "r-1")
    error = document["error"]
    assert (error["type"], error["code"]) == (kind, code)
    assert error["param"] == ("messages[0].content[0]" if case == "image" else None)


@pytest.mark.parametrize(("case", "status", "kind", "code"), ANTHROPIC)
def test_errors_of_the_other_routes_have_openais_shape(
    url: str, case: str, status: int, kind: str, code: str
) -> None:
    answer = ask(url, case)
    assert answer.json().keys() == {"error"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)


def test_anthropics_sdk_reads_the_errors(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:

        def create(case: str, *, stream: bool = False) -> Any:
            extra = {"case": case}
            return client.messages.create(
                model="m", max_tokens=1, messages=[], stream=stream, extra_body=extra
            )

        with pytest.raises(anthropic.NotFoundError) as missing:
            create("vllm 404")
        body: Any = missing.value.body
        assert body["error"]["message"] == "no such model"
        with pytest.raises(anthropic.InternalServerError):
            create("raises")
        with pytest.raises(anthropic.APIStatusError) as streamed:
            list(create("anthropic stream", stream=True))
        assert SECRET not in str(streamed.value)
        body = streamed.value.body
        assert body["error"]["type"] == "api_error"
        assert body["error"]["message"] == "internal error"


def test_openais_sdk_reads_an_error_in_a_stream(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="m", messages=[], stream=True, extra_body={"case": "openai stream"}
        )
        with pytest.raises(openai.APIError) as error:
            list(stream)
    assert (error.value.code, error.value.message) == ("internal_error", "internal error")


# ---------------------------------------------------------------------- invalid bodies


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b'{"content": [{"type": "text"}]}', "content[0].text", "content[0].text is missing"),
        (b'{"content": 3}', "content", "content: the value has a wrong type or form"),
        (b'{"case": []}', "case", "case: the value has a wrong type"),
        (b"[]", None, "input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_the_error_for_an_invalid_body_names_one_value(
    url: str, body: bytes, param: str | None, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(url + PATHS[0], content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert (error["param"], error["message"]) == (param, message)


def test_the_error_for_malformed_json_says_so(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(url + PATHS[0], content=b'{"case": ', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not valid JSON: ")


class _Choice(BaseModel):
    name: str
    value: int


class _Choices(BaseModel):
    type: str = ""  # a field whose name is a key of pydantic's schemas
    items: list[_Choice]


def test_validation_stops_at_the_first_wrong_item_of_a_list() -> None:
    async def route(body: _Choices) -> None: ...

    app = FastAPI()
    app.post("/")(route)
    found: list[int] = []

    async def count(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found.append(len(error.errors()))
        message, param = errors.explained(error)
        return JSONResponse({"message": message, "param": param})

    app.add_exception_handler(RequestValidationError, count)
    stop_at_first_error(app.routes)
    good, bad = {"name": "a", "value": 1}, {"type": "a"}
    with TestClient(app) as client:
        answer = client.post("/", json={"items": [good, *[bad] * 1000]})
        assert answer.json()["param"] == "items[1].name"
        assert client.post("/", json={"items": [good] * 1000}).json() is None
    assert found == [2]


# ---------------------------------------------------------------------- clients that disconnect


@pytest.mark.parametrize(
    ("with_middleware", "nbytes"),
    [(False, 0), (True, 0), (False, 1 << 20)],  # the socket is not read while much waits here
)
def test_work_is_cancelled_when_the_client_disconnects(
    with_middleware: bool, nbytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    ended.clear()
    before = metrics.requests.labels("cancelled")._value.get()
    with running(with_middleware=with_middleware) as url:
        body = {"case": "waits", "content": "x" * nbytes}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + PATHS[0], json=body, timeout=0.3)
        until(lambda: bool(ended))
        assert ask(url, "").status_code == 200
    assert ended == ["waits"]
    assert metrics.requests.labels("cancelled")._value.get() == before + 1
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]
