"""The client's work as generators, which `Client` and `AsyncClient` run each in their own way.

A flow yields steps and gets their results: it has no input and output of its own, so that both
clients share all of it.
"""

import contextlib
import itertools
import random
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from saccade_client.errors import (
    ApiError,
    ConnectionFailed,
    ConnectionLost,
    RateLimited,
    SaccadeError,
    ServerError,
    TimedOut,
    api_error,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send a request; the result is the response. The body of a `stream` that succeeded is unread.

    Raises ConnectionFailed or TimedOut inside the flow.
    """

    method: str
    url: str
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] | None = None
    stream: bool = False


@dataclass(frozen=True)
class Pause:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call a function that takes long, in a thread if the caller must not block."""

    call: Callable[[], Any]


Flow = Generator[Send | Pause | Work, Any, T]

# Waits between attempts without `Retry-After`: up to 0.5 s, 1 s, 2 s... A server that asks for
# more than the longest wait is not asked again.
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_RETRY_AFTER_S = 0.5, 8.0, 120.0
_ERRNO = re.compile(r"^\[Errno -?\d+\] ")
_TRANSIENT = frozenset({429, 500, 502, 503, 504})


def delivered(send: Send, retries: int) -> Flow[httpx.Response]:
    """Send a request until it succeeds, `retries` times again at most.

    It repeats after failed connections, 429, 500, 502, 503 and 504: after the time in `Retry-After`
    and some jitter.

    Raises:
        ApiError, ConnectionFailed, TimedOut: of the last attempt.
    """
    for attempt in itertools.count():
        try:
            response: httpx.Response = yield send
            if response.is_success:
                return response
            raise api_error(response.status_code, response.content, response.headers)
        except (ApiError, ConnectionFailed) as error:
            wait_s = _wait_s(error, attempt)
            if attempt >= retries or wait_s is None:
                raise
        yield Pause(wait_s)
    raise AssertionError("unreachable")


def _wait_s(error: SaccadeError, attempt: int) -> float | None:
    """How long to wait before the next attempt, in seconds; None: there is no use in it."""
    asked: float | None = None
    if isinstance(error, ApiError):
        if error.status not in _TRANSIENT or error.code == "insufficient_quota":
            return None
        if isinstance(error, RateLimited | ServerError):
            asked = error.retry_after_s
    longest: float = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt)
    jitter = random.random()  # noqa: S311 - spreads clients, protects nothing
    if asked is None:
        return longest * (0.5 + jitter / 2)
    return asked + jitter * longest if asked <= _LONGEST_RETRY_AFTER_S else None


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns the errors of httpx into the client's."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        reason = _ERRNO.sub("", str(error)) or "it does not answer"
        raise ConnectionFailed(f"the server cannot be reached: {reason}") from None
    except httpx.TimeoutException:
        raise TimedOut("the server did not answer in time") from None
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
        raise ConnectionLost(f"the connection was lost: {error or type(error).__name__}") from None
    except (httpx.RequestError, httpx.InvalidURL, httpx.StreamError) as error:
        raise ConnectionFailed(f"the connection failed: {error or type(error).__name__}") from None
