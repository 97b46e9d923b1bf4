"""Shapes error responses: OpenAI's shape, and Anthropic's on the routes of its API."""

import asyncio
import inspect
import json
import logging
import re
import traceback
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.errors import (
    STATUS_CODES,
    ClientError,
    SaccadeError,
    Unavailable,
    busy_for_files,
    error_body,
    error_classes,
    full_disk,
)
from server.http.validation import explained, unfit_field
from server.telemetry.record import Record

log = logging.getLogger("saccade.api")

Dialect = Literal["openai", "anthropic"]

INTERNAL = SaccadeError("internal error")
_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/")
# Errors of a validator that does not expect the type of a value, and its caller in FastAPI.
OF_VALIDATORS = (AttributeError, IndexError, KeyError, TypeError)
_VALIDATING = "request_body_to_args"
_INVOKED = "invocations"  # vLLM's route, which tries the models of other routes in turn
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
# How vLLM's message begins when its engine has died, and ours when it has stalled.
_ENGINE_FAULTS = {
    "EngineCore encountered an issue": "the engine has died",
    "EngineCore does not answer": "the engine does not answer",
    "EngineCore is gone": "the engine of this request has ended",
}
# A message that begins with the name of a field.
_FIELD_FIRST = re.compile(
    r"`?((?:n|stop|seed|temperature|logprobs|[a-z]+(?:_[a-z]+)+)(?:\.[a-z_]+)*)`?"
    r" (?:must|cannot|contains|is set|are set|is only|requires)\b"
)
_MAX_MESSAGE = 1000
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


def note_overload(error: SaccadeError) -> None:
    """Log a refusal with status 503, or count it for the log."""
    _overload.note(error)


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
    _answer_unread(app)
    for kind in OF_VALIDATORS:
        _answer_unfit(app, kind)
    app.add_exception_handler(ValueError, _answer_foreign)
    app.add_exception_handler(OverflowError, _answer_foreign)


def _answer_unread(app: FastAPI) -> None:
    """Answer a form whose files could not be stored while it was read, which FastAPI takes for an
    invalid one; pass other errors on to the handler before."""
    before: Any = app.exception_handlers.get(HTTPException, http_exception_handler)

    async def answer(request: Request, error: Exception) -> Any:
        if (shortage := _shortage(error.__cause__)) is not None:
            log.error("failed to read a form: %s", error.__cause__)
            return respond(shortage)
        return await before(request, error)

    app.add_exception_handler(HTTPException, answer)


def _shortage(error: BaseException | None) -> SaccadeError | None:
    """The error to send if the machine has no free file or no room on a disk for a request."""
    return busy_for_files(error) or full_disk(error)


def _answer_unfit(app: FastAPI, kind: type[Exception]) -> None:
    """Answer errors of `kind` that vLLM's validators of bodies raise by mistake, such as for a
    number in the place of an object; pass the others on to the handler before, but for a TypeError,
    whose text vLLM would send."""
    before = app.exception_handlers.get(kind) if kind is not TypeError else _answer_foreign

    async def answer(request: Request, error: Exception) -> Any:
        if (validated := _validated(error)) is not None:
            return respond(unfit(error, *validated))
        if before is None:
            raise error
        answering: Any = before(request, error)
        return await answering

    app.add_exception_handler(kind, answer)


def _validated(error: Exception) -> tuple[Any, Any] | None:
    """The model and the body that were being validated when `error` was raised, by FastAPI or by
    vLLM's `/invocations`; None if it was raised elsewhere."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if frame.f_code.co_name == _VALIDATING:
            fields = values.get("body_fields")
            model = getattr(fields[0].field_info, "annotation", None) if fields else None
            return model, values.get("received_body")
        if frame.f_code.co_name == _INVOKED and "request" not in values:
            return getattr(values.get("request_validator"), "_type", None), values.get("body")
    return None


def unfit(error: Exception, model: Any, body: Any) -> ClientError:
    """The error for a body on which a validator of `model` failed by mistake."""
    log.info("a body made a validator fail: %r", error)
    param = unfit_field(model, body)
    where = f"{param}: the value" if param else "a value in the request body"
    return ClientError(f"{where} has a wrong type", param=param)


async def _answer_foreign(request: Request, error: Exception) -> Any:
    """Answer an error that vLLM takes for the client's: with its text if vLLM raised it, and else
    without the text of the library that did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    if type(error) is ValueError and module.startswith("vllm."):
        message, param = plain(str(error), None)
        return respond(ClientError(message, param=param))
    log.info("a value made a library fail: %r", error)
    return respond(ClientError("a value in the request body is out of range or has a wrong form"))


async def _answer(_: Request, error: Exception) -> JSONResponse:
    # An unknown exception also reaches the outermost layer, which logs it.
    return respond(error if isinstance(error, SaccadeError) else _shortage(error) or INTERNAL)


async def answer_dead_engine(_: Request, error: Exception) -> JSONResponse:
    """Answer a request whose engine has died or stalled under it."""
    log.error("the engine failed under a request: %s", error)
    return respond(Unavailable(_engine_fault(str(error)) or "the engine has died"))


def _engine_fault(message: str) -> str | None:
    """The message for the client if `message` is one of an engine that failed."""
    found = (text for start, text in _ENGINE_FAULTS.items() if message.startswith(start))
    return next(found, None)


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = explained(error)
    return respond(ClientError(message, param=param))


def respond(error: SaccadeError) -> JSONResponse:
    """The response for `error`, in OpenAI's shape."""
    if error.status == 503:
        note_overload(error)
    elif error.status >= 500 and error is not INTERNAL:
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


def shaped_event(event: bytes, dialect: Dialect, record: Record) -> tuple[bytes, str]:
    """Rewrite the error event of a stream, without the blank line after it, in the shape of
    `dialect`; returns the event and the error's code.

    In vLLM's events `code` is an HTTP status. An event without one is the request's refusal, if
    there was one, or an internal error. An event without an `error` object is returned as it is.
    """
    name, _, data = event.rpartition(b"data: ")
    try:
        error = dict(json.loads(data)["error"])
    except (ValueError, TypeError, KeyError):
        return event, INTERNAL.code
    status = error.get("code")
    if not isinstance(status, int) or status not in _ERROR_STATUSES:
        status, refusal = INTERNAL.status, record.refusal
        if refusal is not None:
            status = refusal.status
            error = {"message": refusal.message, "param": refusal.param}
    if dialect == "anthropic":
        name = b"event: error\n"
    written, code = _written(error, status, dialect, record.id, {})
    return name + b"data: " + written, code


def as_clients(error: BaseException) -> SaccadeError:
    """The client's error that is among the causes of `error`, or an internal error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, SaccadeError):
            return found
        if any(kind.__name__ == "VLLMClientError" for kind in type(found).__mro__):
            message, param = plain(str(found), getattr(found, "parameter", None))
            return ClientError(message, param=param)
        found = found.__cause__ or found.__context__
    return _shortage(error) or INTERNAL


def _written(
    error: dict[str, Any], status: int, dialect: Dialect, request_id: str, more: dict[str, Any]
) -> tuple[bytes, str]:
    message, code, kind = error.get("message"), error.get("code"), error.get("type")
    if not isinstance(message, str):
        message = INTERNAL.message
    param = error.get("param")
    if status == 500 and (fault := _engine_fault(message)) is not None:
        status, code, message = Unavailable.status, Unavailable.code, fault
    if not isinstance(code, str):  # not one of ours
        message, param = plain(message, param)
        code = STATUS_CODES.get(status, f"http_{status}")
        if status == 500:
            log.error("request %s failed: %s", request_id, message)
            message = INTERNAL.message
    if kind not in ("invalid_request_error", "rate_limit_error", "server_error"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "authentication_error" if status == 401 else kind
    document = error_body(message, kind, code, param) | more
    if dialect == "anthropic":
        other = "invalid_request_error" if status < 500 else "api_error"
        document["error"]["type"] = _ANTHROPIC_TYPES.get(status, other)
        document = {"type": "error", **document, "request_id": request_id}
    return json.dumps(document).encode(), code


def plain(message: str, param: Any) -> tuple[str, str | None]:
    """vLLM's message without the wrong value, which may be long, and the path of that value.

    vLLM writes the path and the value at the end of the message, or begins it with the path.
    """
    message, mark, _ = message.partition(" (parameter=")
    if not isinstance(param, str):
        found = _FIELD_FIRST.match(message)
        param = found[1] if found is not None and not mark else None
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    return message, param


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
