"""What the client raises.

SaccadeError
├── ConnectionFailed        the server cannot be reached
│   └── ConnectionLost      the server closed the connection before its answer was complete
├── TimedOut                no answer within the client's own time limit
├── UnexpectedAnswer        not what this API answers: the server is another one
├── UnusableMedia           a file, array or picture that cannot be sent
├── OutputLocked            another process writes the same file of results
└── ApiError                the server's refusal: status, code, param
    ├── InvalidRequest      4xx: the same request would fail again
    │   ├── TooLarge        413
    │   └── NotFound        404: no such model, file or route
    ├── NotAuthorized       401, 403
    ├── RateLimited         429
    ├── DeadlineExceeded    408: the request's deadline passed on the server
    └── ServerError         5xx
        └── ServerBusy      503: overloaded, or shutting down
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class SaccadeError(Exception):
    """Base of all errors of the client."""


class ConnectionFailed(SaccadeError):
    """The server cannot be reached."""


class ConnectionLost(ConnectionFailed):
    """The server closed the connection before its answer was complete."""


class TimedOut(SaccadeError):
    """No answer within the client's time limit."""


class UnexpectedAnswer(SaccadeError):
    """The answer is not in the form of the API."""


class UnusableMedia(SaccadeError):
    """A file, an array or a picture that cannot be read or sent."""


class OutputLocked(SaccadeError):
    """Another process writes the same file of results."""


class ApiError(SaccadeError):
    """The server refused the request.

    `status` is that of HTTP (200 for an error in a stream), `code` the server's stable code,
    `param` the part of the request at fault, `retry_after_s` the time after which the server
    suggests to try again.
    """

    def __init__(
        self, status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.message = str(error.get("message") or f"the server answered with status {status}")
        self.code = _text(error.get("code"))
        self.type = _text(error.get("type"))
        self.param = _text(error.get("param"))
        headers = headers or {}
        self.request_id = headers.get("x-request-id")
        self.retry_after_s = _retry_after_s(headers)
        super().__init__(self.message)

    def __str__(self) -> str:
        place = f" (at {self.param})" if self.param else ""
        return f"{self.message}{place} [{self.status} {self.code or self.type or ''}]".replace(
            " ]", "]"
        )


class InvalidRequest(ApiError):
    """The request is wrong; the same request would fail again."""


class TooLarge(InvalidRequest):
    """A picture, a file or the whole request exceeds a limit."""


class NotFound(InvalidRequest):
    """No such model, file or route."""


class NotAuthorized(ApiError):
    """The API key is missing or unknown, or may not do this."""


class RateLimited(ApiError):
    """The key is over one of its limits."""


class DeadlineExceeded(ApiError):
    """The deadline of the request passed while the server worked on it."""


class ServerError(ApiError):
    """The server failed; the request is not at fault."""


class ServerBusy(ServerError):
    """The server is overloaded, or shuts down."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    408: DeadlineExceeded,
    413: TooLarge,
    429: RateLimited,
    503: ServerBusy,
}


def api_error(status: int, body: bytes | str, headers: Mapping[str, str] | None = None) -> ApiError:
    """The error that an answer with this status and body means; `headers` by lower-case names."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    error = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(error, dict):
        error = {"message": error if isinstance(error, str) else None}
    return of_status(status)(status, error, headers)


def of_status(status: int) -> type[ApiError]:
    """The class of errors with this status."""
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return ServerError if status >= 500 else InvalidRequest


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After`, which is a number of seconds or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
