"""Shapes error responses: OpenAI's shape, and Anthropic's on the routes of its API."""

import asyncio
import inspect
import json
import logging
import traceback
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from server.errors import STATUS_CODES, ClientError, SaccadeError, error_body, error_classes
from server.http.validation import explained

log = logging.getLogger("saccade.api")

Dialect = Literal["openai", "anthropic"]

_INTERNAL = SaccadeError("internal error")
INTERNAL_ERROR = json.dumps(error_body(_INTERNAL.message, _INTERNAL.type, _INTERNAL.code)).encode()
_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/")
# Errors of a validator that does not expect the type of a value, and its caller in FastAPI.
_OF_VALIDATORS = (AttributeError, IndexError, KeyError, TypeError)
_VALIDATING = "request_body_to_args"
# Anthropic's types of errors, by status.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_ERROR_STATUSES = range(400, 600)
_OVERLOAD_LOG_S = 1.0


class OverloadLog:
    """Logs refusals with status 503: the first at once, then their number once a second."""

    def __init__(self) -> None:
        self._more = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, error: SaccadeError) -> None:
        """Log or count a refusal. Call it on the event loop."""
        if self._timer is not None:
            self._more += 1
            return
        log.warning("%s: %s", error.code, error.message)
        self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_OVERLOAD_LOG_S, self._tell)

    def _tell(self) -> None:
        more, self._more, self._timer = self._more, 0, None
        if more:
            log.warning("%d more requests were refused with status 503", more)
            self._wait()


_overload = OverloadLog()


def dialect_of(path: str) -> Dialect:
    """The API whose error shape the path has."""
    is_anthropic = path == _ANTHROPIC_PATHS[0] or path.startswith(_ANTHROPIC_PATHS[1])
    return "anthropic" if is_anthropic else "openai"


def add_error_handlers(app: FastAPI) -> None:
    """Answer our own errors, bodies that do not fit their route, and unknown exceptions. vLLM's
    errors are answered by its own handlers."""
    app.add_exception_handler(SaccadeError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer)
    for kind in _OF_VALIDATORS:
        _answer_unfit(app, kind)


def _answer_unfit(app: FastAPI, kind: type[Exception]) -> None:
    """Answer errors of `kind` that vLLM's validators of bodies raise by mistake, such as for a
    number in the place of an object; pass the others on to the handler before."""
    before = app.exception_handlers.get(kind)

    async def answer(request: Request, error: Exception) -> Any:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_name == _VALIDATING for frame, _ in frames):
            log.info("a body made a validator fail: %r", error)
            return respond(ClientError("a value in the request body has a wrong type"))
        if before is None:
            raise error
        answering: Any = before(request, error)
        return await answering

    app.add_exception_handler(kind, answer)


async def _answer(_: Request, error: Exception) -> JSONResponse:
    # An unknown exception also reaches the outermost layer, which logs it.
    return respond(error if isinstance(error, SaccadeError) else _INTERNAL)


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = explained(error)
    return respond(ClientError(message, param=param))


def respond(error: SaccadeError) -> JSONResponse:
    """The response for `error`, in OpenAI's shape."""
    if error.status == 503:
        _overload.note(error)
    elif error.status >= 500 and error is not _INTERNAL:
        log.warning("%s: %s", error.code, error.message)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    body = error_body(error.message, error.type, error.code, error.param)
    return JSONResponse(body, status_code=error.status, headers=headers)


def shaped(body: bytes, status: int, dialect: Dialect, request_id: str) -> tuple[bytes, str] | None:
    """Rewrite the error body of any route in the shape of `dialect`; returns the body and the
    error's code, or None if `body` has no known error shape.

    vLLM's own errors have the HTTP status as their code and its phrase as their type; some of its
    middleware sends only a text.
    """
    try:
        parsed = json.loads(body)
    except ValueError:
        return None
    error = parsed.get("error", parsed.get("detail")) if isinstance(parsed, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict) or "message" not in error:
        return None
    more = {name: value for name, value in parsed.items() if name not in ("error", "detail")}
    return _written(error, status, dialect, request_id, more)


def shaped_event(event: bytes, dialect: Dialect, request_id: str) -> tuple[bytes, str]:
    """Rewrite the error event of a stream, without the blank line after it, in the shape of
    `dialect`; returns the event and the error's code.

    In vLLM's events `code` is an HTTP status. An event without one is an internal error. An event
    without an `error` object is returned as it is.
    """
    name, _, data = event.rpartition(b"data: ")
    try:
        error = dict(json.loads(data)["error"])
    except (ValueError, TypeError, KeyError):
        return event, _INTERNAL.code
    status = error.get("code")
    if not isinstance(status, int) or status not in _ERROR_STATUSES:
        status = _INTERNAL.status
    if dialect == "anthropic":
        name = b"event: error\n"
    written, code = _written(error, status, dialect, request_id, {})
    return name + b"data: " + written, code


def _written(
    error: dict[str, Any], status: int, dialect: Dialect, request_id: str, more: dict[str, Any]
) -> tuple[bytes, str]:
    message, code, kind = error.get("message"), error.get("code"), error.get("type")
    if not isinstance(message, str):
        message = _INTERNAL.message
    if not isinstance(code, str):  # not one of ours
        code = STATUS_CODES.get(status, f"http_{status}")
        if status == 500:
            log.error("request %s failed: %s", request_id, message)
            message = _INTERNAL.message
    if kind not in ("invalid_request_error", "server_error"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "authentication_error" if status == 401 else kind
    document = error_body(message, kind, code, error.get("param")) | more
    if dialect == "anthropic":
        other = "invalid_request_error" if status < 500 else "api_error"
        document["error"]["type"] = _ANTHROPIC_TYPES.get(status, other)
        document = {"type": "error", **document, "request_id": request_id}
    return json.dumps(document).encode(), code


def with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """The headers of a request or a response, for a body of `length` bytes."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


def as_markdown() -> str:
    """The content of `docs/errors.md`, with the table of all codes."""
    rows = {
        error.code: (error.status, " ".join((inspect.getdoc(error) or "").split()))
        for error in error_classes()
    }
    for status, code in STATUS_CODES.items():
        rows.setdefault(code, (status, f"{HTTPStatus(status).phrase}; `message` has the reason."))
    lines = [
        "# Errors",
        "",
        'Every error has OpenAI\'s shape: `{"error": {message, type, param, code}}`. `code` is one',
        "of the codes below and does not change between versions; `param` is the path of the wrong",
        "value in the request. `type` is `invalid_request_error` below 500 (the same request would",
        "fail again), `authentication_error` for 401, and `server_error` from 500.",
        "",
        "On `/v1/messages` errors have Anthropic's shape,",
        '`{"type": "error", "error": {type, message, param, code}, "request_id"}`, with the types',
        "of its API, such as `not_found_error`; `param` and `code` are as in OpenAI's shape.",
        "",
        "| Code | Status | |",
        "| --- | --- | --- |",
    ]
    ordered = sorted(rows.items(), key=lambda row: (row[1][0], row[0]))
    lines += [f"| `{code}` | {status} | {text} |" for code, (status, text) in ordered]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
