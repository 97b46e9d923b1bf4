"""HTTP/1.1 connections under limits that apply before the API key of a request is known.

uvicorn's protocol limits neither the head of a request nor the time that it takes, and keeps a
connection whose client never reads its answer. This subclass limits all three. A refusal is an
error in OpenAI's shape, after which the connection is closed.
"""

import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn.server
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from server.concurrency import DONE
from server.errors import (
    ClientError,
    HeadersTooLarge,
    RequestTimeout,
    SaccadeError,
    ServerBusy,
    UrlTooLong,
)
from server.http import head_check
from server.http.byte_budget import Expected
from server.http.head_check import HeadCheck
from server.http.large_body import LargeBody
from server.http.scope import set_connection
from server.telemetry import metrics

# This is called for each header; `super()` would make it a quarter slower.
_add_header = HttpToolsProtocol.on_header

# A client may send this many requests before it gets the first answer.
_MAX_PIPELINED = 32
# Chunk headers, chunk extensions and trailers may take this much more than the body itself.
_MAX_FRAMING_BYTES = 64 * 1024
# How long a refused client may go on sending. Closing at once would discard the refusal, since the
# kernel resets a connection that is closed with unread data.
_LINGER_S = 2.0
_MAX_LINGERING = 256
# So many bodies at most are read past uvicorn, each of which takes a file descriptor.
_MAX_LARGE_BODIES = 64
# Together, refused clients are read from about once in this time: 50 MB a second.
_LINGER_PAUSE_S = 0.005
# A connection whose first request has not come after this is closed when the server drains.
_FIRST_REQUEST_S = 1.0


class ServerState(uvicorn.server.ServerState):
    """What the connections share. While the server `drains`, each answer ends its connection; it no
    longer waits for requests when it `must_end`. It stops by itself when its `engine_has_died`."""

    drains = False
    must_end = False
    engine_has_died = False
    lingering = 0
    """Connections whose clients were refused, and may go on sending for a while."""
    large_bodies = 0
    """Bodies that are being read past uvicorn."""

    def __init__(self) -> None:
        super().__init__()
        self._paused: deque[Connection] = deque()
        self._is_reading = False

    def read_later(self, connection: "Connection") -> None:
        """Read what a refused client sends when it is its turn. All share one timer, since a flood
        of refusals would otherwise have one for each."""
        self._paused.append(connection)
        if not self._is_reading:
            self._is_reading = True
            connection.loop.call_later(_LINGER_PAUSE_S, self._read_next)

    def _read_next(self) -> None:
        self._is_reading = False
        while self._paused and not self._is_reading:
            connection = self._paused.popleft()
            self._is_reading = connection.read_on()  # else it is closed, and another's turn
        if self._is_reading:
            connection.loop.call_later(_LINGER_PAUSE_S, self._read_next)


@dataclass(frozen=True)
class ConnectionLimits:
    """`files` is the number of file descriptors that connections may be among: the process may open
    more. `header_bytes` counts the names and values of all header fields. `send_timeout_s` is the
    longest time in which a client may take nothing of its answer."""

    connections: int
    files: int
    url_bytes: int
    header_bytes: int
    header_fields: int
    header_timeout_s: float
    send_timeout_s: float


class Connection(HttpToolsProtocol):
    """One connection. `check` must be called about once a second. `on_leaving` is called when the
    client leaves, or is refused, while it waits for an answer."""

    server_state: ServerState
    on_leaving: Callable[[], None] | None = None

    def __init__(
        self, *args: Any, limits: ConnectionLimits, heads: HeadCheck | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.url, self.headers = b"", []  # of a connection that is refused at once
        self._heads = heads
        self._limits = limits
        self._max_header_bytes = limits.header_bytes
        self._max_header_fields = limits.header_fields
        self._error: SaccadeError | None = None
        self._refused_at: float | None = None
        # Since when the next head is expected or incomplete; None while it need not be in time.
        self._head_since: float | None = None
        self._in_head = self._in_body = self._begins_here = self._had_request = False
        self._field_bytes = self._open_bytes = 0
        self._body_bytes = self._wire_bytes = 0
        self._unsent, self._unsent_since = 0, 0.0
        self._large_body: LargeBody | None = None
        self._expected: Expected | None = None
        # So many bytes of the body are left when a part of it was read past the parser.
        self._past_parser = 0

    @property
    def engine_has_died(self) -> bool:
        """Whether the server stops for this reason."""
        return self.server_state.engine_has_died

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        self._head_since = self.loop.time()
        if self._heads is not None:
            self._heads.note_arrival()
        if len(self.connections) > self._limits.connections:
            self._refuse(ServerBusy("the server has too many connections"))
        elif self._takes_last_file(transport):
            self._refuse(ServerBusy("the server has no free file descriptors; try again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._large_body is not None:
            self._large_body.stop()
        self.body_begins()
        if self._refused_at is not None:
            self.server_state.lingering -= 1
        if self.on_leaving is not None:
            self.on_leaving()

    def _takes_last_file(self, transport: Any) -> bool:
        """Whether hardly any file is free: the kernel gives the lowest number that is. Without one
        for the next connection, libuv would close it without a word."""
        sock = transport.get_extra_info("socket")
        return sock is not None and sock.fileno() >= self._limits.files

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; refuse the request if it exceeds a limit."""
        if self._refused_at is not None:
            self._pause_lingering()
            return
        if self._past_parser and not (data := self._without_body(data)):
            return
        if self._head_since is None and (self.cycle is None or self.cycle.response_complete):
            self._head_since = self.loop.time()
        if self._in_body:
            self._wire_bytes += len(data)
        self._begins_here = False
        super().data_received(data)
        if self._error is not None:
            return
        if self._in_head and not self._begins_here:  # all of `data` belongs to one unfinished head
            self._open_bytes += len(data)
            if self._open_bytes > self._limits.header_bytes + self._limits.url_bytes:
                self._refuse(self._headers_too_large())
        elif (
            self._in_body
            and self._wire_bytes > _MAX_FRAMING_BYTES + 2 * self._body_bytes  # tiny chunks
        ):
            self._refuse(
                ClientError("the chunk headers and trailers take more bytes than the request body")
            )

    def _pause_lingering(self) -> None:
        self.transport.pause_reading()
        self.server_state.read_later(self)

    # ------------------------------------------------------------------ large bodies

    def body_begins(self) -> bool:
        """The body takes its share of the memory, or never will. Returns whether it was let in by
        its head."""
        expected, self._expected = self._expected, None
        if expected is not None:
            expected.end()
        return expected is not None

    def rest_of_body(self, nbytes: int) -> LargeBody | None:
        """Let the caller read the rest of the body, `nbytes`, past uvicorn. None if it cannot be
        read in this way: the connection is encrypted, or there are many of them already. Call it
        when `receive` has just returned all that had arrived."""
        state, sock = self.server_state, self.transport.get_extra_info("socket")
        if (
            self.scheme != "http"
            or sock is None
            or self.transport.is_closing()
            or self.cycle.body
            or self.parser.should_upgrade()
            or state.large_bodies >= _MAX_LARGE_BODIES
        ):
            return None
        try:
            body = LargeBody(sock.fileno(), nbytes, self._large_body_ended)
        except OSError:
            return None
        self.flow.pause_reading()
        state.large_bodies += 1
        self._large_body = body
        return body

    def _large_body_ended(self, left: int) -> None:
        """What comes now is the rest of the body, `left` bytes, and then the next request."""
        self.server_state.large_bodies -= 1
        self._large_body, self._past_parser = None, left
        if self.transport.is_closing():
            return
        if not left:
            self._end_past_parser()
        elif self.cycle.response_complete:
            self.flow.resume_reading()

    def _without_body(self, data: bytes) -> bytes:
        """Take what is left of the body from `data`; returns the rest, which is for the parser."""
        body, data = data[: self._past_parser], data[self._past_parser :]
        self._past_parser -= len(body)
        self.on_body(body)
        if not self._past_parser:
            self._end_past_parser()
        return data

    def _end_past_parser(self) -> None:
        """End a body whose end the parser has not seen: the next request gets another parser."""
        self.on_message_complete()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def read_on(self) -> bool:
        """Read from the connection again, unless it is closed; returns whether it is not."""
        if self.transport.is_closing():
            return False
        self.transport.resume_reading()
        return True

    def check(self, now: float) -> None:
        """Close the connection if its client is too slow. `now` is the time of the event loop."""
        limits = self._limits
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if self._refused_at is not None:
            if now - self._refused_at > _LINGER_S:
                self.transport.abort()
        elif (
            self._head_since is not None and now - self._head_since > self._limits.header_timeout_s
        ):
            if self._in_head:
                limit = self._limits.header_timeout_s
                self._refuse(RequestTimeout(f"the headers did not arrive within {limit:g} s"))
            else:
                self.transport.close()
                self._head_since = None
        elif now - self._unsent_since > limits.send_timeout_s:
            self.transport.abort()

    def announce_end(self) -> None:
        """Let the answer of the current request say that it is the last on this connection, unless
        it has begun."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection when it has no request, and none is on its way: call it again until
        it is closed."""
        if not (self._in_head or self._is_new()):
            super().shutdown()

    def _is_new(self) -> bool:
        """Whether the client has just connected, so that its request may be under way."""
        if self._had_request or self._head_since is None or self.server_state.must_end:
            return False
        return self.loop.time() - self._head_since < _FIRST_REQUEST_S

    # ------------------------------------------------------------------ callbacks of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        set_connection(self.scope, self)  # type: ignore[arg-type]
        self._in_head = self._begins_here = True
        self._field_bytes = self._open_bytes = 0
        self._body_bytes = self._wire_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            limit = self._limits.url_bytes
            self._fail(UrlTooLong(f"the URL has more than {limit} bytes, which is the limit"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes = nbytes = self._field_bytes + len(name) + len(value)
        if nbytes > self._max_header_bytes or len(self.headers) >= self._max_header_fields:
            self._fail(self._headers_too_large())
        if self._in_head:  # trailers are dropped: the checks of headers are over
            _add_header(self, name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._fail(ClientError("too many requests were sent without waiting for an answer"))
        self._in_head, self._in_body, self._had_request = False, True, True
        self._head_since = None
        if self._is_refused():
            return
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.__class__ = _Cycle
        if self.server_state.drains:
            self.announce_end()

    def _is_refused(self) -> bool:
        """Whether the request is refused by its head."""
        is_next = self.cycle is None or self.cycle.response_complete
        if self._refused_at is None and self._heads is not None and is_next:
            decided = self._heads.decide(self.parser.get_method(), self.url, self.headers)
            if isinstance(decided, SaccadeError):
                head_check.note(decided)
                self._refuse(decided)
                if not self.transport.is_closing():
                    self._pause_lingering()
            else:
                self._expected = decided
        return self._refused_at is not None

    def on_body(self, body: bytes) -> None:
        if self._refused_at is not None:
            return
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._refused_at is not None:
            return
        super().on_message_complete()
        if not self.pipeline:  # else nothing more is to be read for now
            self.flow.resume_reading()  # to notice when the client leaves

    def on_response_complete(self) -> None:
        self.body_begins()
        super().on_response_complete()
        if self._large_body is not None:
            self.flow.pause_reading()
        if self._in_head:  # of a request that was sent before this answer
            self._head_since = self.loop.time()

    def handle_websocket_upgrade(self) -> None:
        """Begin a websocket, unless the request was refused. Of one with a body, nobody would limit
        how long the connection stays."""
        self.body_begins()  # the websocket hears of the end of the connection, not this one
        if self.scope["method"] != "GET":
            self._refuse(ClientError("a websocket begins with a GET request"))
        if self._refused_at is None:
            super().handle_websocket_upgrade()

    # ------------------------------------------------------------------ refusals

    def _fail(self, error: SaccadeError) -> None:
        """End a callback: the parser stops, and uvicorn calls `send_400_response`."""
        self._error = error
        raise error

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that the parser or one of its callbacks did not accept."""
        self._error = self._error or ClientError("the request is not valid HTTP/1.1")
        self._refuse(self._error)

    def _headers_too_large(self) -> HeadersTooLarge:
        limits = self._limits
        return HeadersTooLarge(
            f"the headers have more than {limits.header_bytes} bytes or {limits.header_fields} "
            "fields, which are the limits"
        )

    def _refuse(self, error: SaccadeError) -> None:
        """Send `error` and no longer read requests. Only close the connection if another answer is
        under way. Does nothing if a request was refused before: more may have come with it."""
        if self._refused_at is not None:
            return
        self._refused_at = self.loop.time()
        self.server_state.lingering += 1
        self._unset_keepalive_if_required()
        metrics.refusals.labels(error.code).inc()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self.pipeline or self._in_head:
                self.transport.close()
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if self.on_leaving is not None:
                self.on_leaving()
        body, fields = head_check.answer(error, self.url, self.headers)
        lines = b"".join(b"%s: %s\r\n" % f for f in (*self.server_state.default_headers, *fields))
        self._send_now(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        crowded = len(
            self.connections
        ) > self._limits.connections + _MAX_LINGERING or self._takes_last_file(self.transport)
        if self.transport.can_write_eof() and not crowded:
            self.transport.write_eof()
        else:  # also with TLS
            self.transport.close()

    def _send_now(self, data: bytes) -> None:
        """Send `data`, past uvloop if nothing was sent before: it sends only after it has handled
        all that has arrived, which may be hundreds of heads."""
        sock = self.transport.get_extra_info("socket")
        is_first = self.cycle is None
        if is_first and self.scheme == "http" and sock is not None:
            with contextlib.suppress(OSError):
                data = data[os.write(sock.fileno(), data) :]
        if data:
            self.transport.write(data)


class _Cycle(RequestResponseCycle):
    """Writes the chunks of a stream at once, without a coroutine for each."""

    def send(self, message: Any) -> Awaitable[None]:  # type: ignore[override]
        """Send one ASGI message."""
        if (
            message.get("more_body")
            and self.response_started
            and self.chunked_encoding
            and not self.response_complete
            and not self.disconnected
            and not self.flow.write_paused
            and self.scope["method"] != "HEAD"
        ):
            if body := message.get("body"):
                self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            return DONE
        return super().send(message)
