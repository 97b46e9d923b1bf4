"""Refuses requests by their heads, before anything else is done for them.

A flood of large bodies is a flood of heads first. All layers of the app would take most of a
millisecond for each, in which the event loop does nothing else. So the connection itself refuses a
body that would find no room, and those that are let in begin when no more heads come.
"""

import json
from collections.abc import Callable, Sequence

from server.concurrency import Turns
from server.errors import SaccadeError, error_body
from server.http import errors
from server.http.answer import request_id
from server.http.byte_budget import ByteBudget, Expected
from server.http.headers import length_in
from server.request.read import SMALL_BODY_BYTES
from server.telemetry import metrics

Headers = Sequence[tuple[bytes, bytes]]

_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})
_REFUSED = metrics.requests.labels("refused")


class HeadCheck:
    """What the connections know of the memory for bodies."""

    def __init__(
        self,
        bodies: ByteBudget,
        max_bytes: int,
        is_passed_on: Callable[[str], bool] = lambda path: False,
        begun: Turns | None = None,
    ) -> None:
        """Larger bodies than `max_bytes` are left to the app, which refuses them for good; those
        whose path `is_passed_on` are to the process that gets them. Requests begin in the turns
        `begun`."""
        self._bodies = bodies
        self._max_bytes = max_bytes
        self._is_passed_on = is_passed_on
        self._begun = begun

    def note_arrival(self) -> None:
        """Somebody has connected, and is to be heard before others begin or more of the bodies is
        read: others wait for a refusal."""
        self._give_way()

    def _give_way(self) -> None:
        self._bodies.turns.give_way()
        if self._begun is not None:
            self._begun.give_way()

    def decide(self, method: bytes, url: bytes, headers: Headers) -> SaccadeError | Expected | None:
        """Why a request is refused; else, what its body will take. None: the app decides. That also
        answers pages of other sites, since browsers show them no error without the headers for
        it."""
        if method not in _WITH_BODY:
            return None
        length = 0
        for name, value in headers:
            if name == b"content-length":
                length = length_in(value)
            elif name == b"origin":
                return None
        if not SMALL_BODY_BYTES < length <= self._max_bytes or self._is_passed_on(_path_of(url)):
            return None
        refused = self._bodies.refusal(length)
        if refused is None:
            return self._bodies.expect(length)
        self._give_way()
        return refused


def note(error: SaccadeError) -> None:
    """Count and log a refusal."""
    _REFUSED.inc()
    errors.note_overload(error)


def answer(
    error: SaccadeError, url: bytes, headers: Headers
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body and the headers of the answer to a request whose head was not read to the end, or
    was; `url` and `headers` are as far as they are known."""
    body = json.dumps(error_body(error.message, error.type, error.code)).encode()
    name = request_id(headers)
    dialect = errors.dialect_of(_path_of(url))
    if dialect != "openai" and (shaped := errors.shaped(body, error.status, dialect, name)):
        body, _ = shaped
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", name.encode()),
        (b"connection", b"close"),
    ]
    if error.retry_after_s:
        fields.append((b"retry-after", str(error.retry_after_s).encode()))
    return body, fields


def _path_of(url: bytes) -> str:
    return url.partition(b"?")[0].decode("latin-1")
