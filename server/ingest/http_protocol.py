"""aiohttp's client protocol, with additional limits against hostile servers.

Heads are parsed on the event loop. aiohttp limits the number and the length of header fields, but
it parses any number of interim (1xx) responses that arrive in one read, and sizes and extensions of
chunks without end, takes data that arrives on an idle connection for the answer to the next
request, and takes a reset for the end of a body without a length. Both hooks used here,
`BaseConnector._factory` and `ResponseHandler`, are not documented: `tests/processes/test_fetch.py`
fails if they stop working.
"""

import asyncio
import functools
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.streams import StreamReader

# Most bytes that are parsed at once where one read may hold many messages: of a head, and of a body
# without a length.
HEAD_STEP_BYTES = 4096
CHUNKS_STEP_BYTES = 16 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM_RESPONSES = 8
# Sizes of chunks, their extensions and trailers, beyond one byte for each byte of the body.
MAX_FRAMING_BYTES = 64 * 1024


class NoResponse(aiohttp.ClientError):
    """The connection broke before the server had sent anything in response to the request."""


class BrokenResponse(aiohttp.ClientError):
    """The server sent an incomplete or invalid response, or more than the limits allow."""


class BoundedConnector(aiohttp.TCPConnector):
    """A connector whose connections have the limits of `_BoundedProtocol`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        factory = functools.partial(_BoundedProtocol, loop=asyncio.get_running_loop())
        self._factory = cast("functools.partial[ResponseHandler]", factory)


class _BoundedProtocol(ResponseHandler):
    """One connection. `_body` is the body of the last response; data after it is not parsed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._in_head = False
        self._head_bytes = self._body_bytes = self._interim_responses = 0
        self._body: StreamReader | None = None
        self._length: int | None = None

    def set_response_params(self, **params: Any) -> None:
        """aiohttp calls this before it sends a request."""
        self._in_head = True
        self._head_bytes = self._body_bytes = self._interim_responses = 0
        self._body = None
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if not data:  # the parser resumes after a pause
            super().data_received(data)
        parsed = 0
        while parsed < len(data):
            if self.exception() is not None or not self._is_expecting():
                self._abort_transport()
                return
            piece = data[parsed : parsed + self._step()]
            parsed += len(piece)
            if self._in_head:
                self._head_bytes += len(piece)
            else:
                self._body_bytes += len(piece)
            super().data_received(piece)
            if self._is_excessive():
                self.set_exception(BrokenResponse("too much data that is not the body"))
                self._abort_transport()
                return

    def _is_excessive(self) -> bool:
        """Whether the server has sent too much that is not the body, which is limited elsewhere."""
        if self._in_head:
            return (
                self._head_bytes > MAX_HEAD_BYTES or self._interim_responses > MAX_INTERIM_RESPONSES
            )
        body = self._body.total_bytes if self._body is not None else 0
        return self._body_bytes > 2 * body + MAX_FRAMING_BYTES

    def _is_expecting(self) -> bool:
        return self._in_head or (self._body is not None and not self._body.is_eof())

    def _step(self) -> int:
        """How many bytes may be parsed before the next look at the limits."""
        if self._in_head or self._body is None:
            return HEAD_STEP_BYTES
        if self._length is not None:
            return max(1, self._length - self._body.total_bytes)
        return CHUNKS_STEP_BYTES

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """aiohttp calls this for each head that it has parsed."""
        message, body = data
        if 100 <= message.code < 200:
            self._interim_responses += 1
        elif self._in_head:
            self._in_head = False
            self._body = body
            length = message.headers.get("Content-Length")
            self._length = int(length) if length and not message.chunked else None
        super().feed_data(data, size)

    def connection_lost(self, error: BaseException | None) -> None:
        body = self._body
        if error is not None and body is not None and not body.is_eof():
            body.set_exception(BrokenResponse("the connection broke"))
        super().connection_lost(error)

    def set_exception(self, error: BaseException, *cause: BaseException) -> None:
        """aiohttp calls this when the connection is lost, and when it receives invalid HTTP."""
        lost = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
        if self._in_head and isinstance(error, lost):
            error = BrokenResponse("the connection broke") if self._head_bytes else NoResponse()
        super().set_exception(error, *cause)
        # When the parser finds an error in a body, it drops the body without notifying the reader.
        if self._body is not None and not self._body.is_eof() and self._body.exception() is None:
            self._body.set_exception(BrokenResponse("invalid HTTP"))

    def close(self) -> None:
        """Close at once: with a TLS shutdown, the server could keep the connection open."""
        self.abort()

    def _abort_transport(self) -> None:
        if self.transport is not None:  # `abort` would also forget the exception
            self.transport.abort()
