"""The one way out for errors: the OpenAI error object, whoever raised it."""

import asyncio
import inspect
import json
import logging
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import STATUS_CODES, SaccadeError, error_body, error_classes
from server.telemetry import record

log = logging.getLogger("saccade.api")

# An error's body is a few hundred bytes; a longer one is not ours to rewrite.
_MAX_ERROR_BYTES = 64 * 1024
_OVERLOAD_LOG_S = 1.0


class OverloadLog:
    """Logs refusals of an overloaded server: the first at once, then once a second how many."""

    def __init__(self) -> None:
        self._more = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, error: SaccadeError) -> None:
        """Call it on the event loop."""
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


def add_error_handler(app: FastAPI) -> None:
    """Answer our own errors and the unforeseen; vLLM's are answered by its handlers and shaped by
    the middleware."""
    app.add_exception_handler(SaccadeError, _answer)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, SaccadeError):  # the traceback is logged further out
        error = SaccadeError("internal error")
    return respond(error)


def respond(error: SaccadeError) -> JSONResponse:
    """The response for `error`, naming the part of the request it is about."""
    if error.status == 503:
        _overload.note(error)
    elif error.status >= 500:
        log.warning("%s: %s", error.code, error.message)
    record.current().error_code = error.code
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    body = error_body(error.message, error.type, error.code, error.param)
    return JSONResponse(body, status_code=error.status, headers=headers)


class OpenAIErrors:
    """Gives every JSON error of any route OpenAI's shape: a known type and a text code.

    vLLM's own errors carry the HTTP status as their code and its phrase as their type, some of its
    middleware a bare text. Streams and successes pass untouched.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def rewrite(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                held = message
                return
            if held is None:
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body") and len(body) <= _MAX_ERROR_BYTES:
                return
            start, held = held, None
            complete = not message.get("more_body")
            shaped = _shape(body, start["status"]) if complete else None
            if shaped is not None:
                body, record.current().error_code = shaped
                start["headers"] = with_length(start, len(body))
            await send(start)
            await send({**message, "body": body})

        await self._app(scope, receive, rewrite)


def _shape(body: bytes, status: int) -> tuple[bytes, str] | None:
    """`body` in OpenAI's shape, and the error's code; None if it is none of the shapes that errors
    have here."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return None
    error = parsed.get("error", parsed.get("detail")) if isinstance(parsed, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict) or "message" not in error:
        return None
    code = error.get("code")
    if not isinstance(code, str):
        code = STATUS_CODES.get(status, f"http_{status}")
    known = error.get("type") in ("invalid_request_error", "server_error")
    if known:
        kind = error["type"]
    elif status == 401:
        kind = "authentication_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    shaped = error_body(error["message"], kind, code, error.get("param"))
    extra = {name: value for name, value in parsed.items() if name not in ("error", "detail")}
    return json.dumps(shaped | extra).encode(), code


def with_length(holder: MutableMapping[str, Any], length: int) -> list[tuple[bytes, bytes]]:
    """The headers of a scope or a response, for a body of `length` bytes."""
    kept = [(name, value) for name, value in holder["headers"] if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


def as_markdown() -> str:
    """The table of all codes, as `docs/errors.md` has it."""
    rows = {error.code: (error.status, inspect.getdoc(error) or "") for error in error_classes()}
    for status, code in STATUS_CODES.items():
        rows.setdefault(code, (status, f"{HTTPStatus(status).phrase}, as the route says."))
    lines = [
        "# Errors",
        "",
        'Every error has OpenAI\'s shape: `{"error": {message, type, param, code}}`. `code` is one',
        "of these and does not change; `param` is the path of what is at fault in the request.",
        "`type` is `invalid_request_error` below 500, when sending the same request again is of no",
        "use, `authentication_error` for 401, and `server_error` from 500.",
        "",
        "| Code | Status | |",
        "| --- | --- | --- |",
    ]
    ordered = sorted(rows.items(), key=lambda row: (row[1][0], row[0]))
    lines += [f"| `{code}` | {status} | {text} |" for code, (status, text) in ordered]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
