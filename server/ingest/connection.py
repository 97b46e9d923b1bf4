"""HTTP/1.1 connections to the servers of images.

They stand on h11 and the loop's own transports. The pool of httpx loses a place for good whenever
a request is cancelled while it waits for one, and takes twice as long over a body.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import cast

import h11

# Heads are parsed on the loop: no more of one at once, none larger, and no more before the last.
HEAD_READ_BYTES = 16 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM_RESPONSES = 8
# What a connection holds before the server must wait; one read by the loop may come on top.
HIGH_WATER_BYTES = 256 * 1024
KEEP_ALIVE_S = 15.0

Origin = tuple[str, str, int, str]
"""(scheme, host, port, group of API keys): nobody can tell by a handshake that is not made whether
another group has fetched from a host."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; serves one request, and another if it can `recycle`.

    Attributes:
        heard: bytes received since the last request was sent.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._received: deque[bytes] = deque()
        self._held = 0
        self._paused = False
        self._ended = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        if self._http.our_state is h11.IDLE:  # nobody has asked anything
            self.close()
            return
        self.heard += len(data)
        self._received.append(data)
        self._held += len(data)
        if self._held > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        self._news.set()

    # What the fetcher calls.

    async def get(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Response:
        """Ask for `target`; returns the head of the answer. Closes the connection if it fails.

        Raises:
            OSError: the connection broke.
            h11.RemoteProtocolError: it ended, or what came is not HTTP.
        """
        self.heard = 0
        try:
            self._send(target, headers)
            return await self._head()
        except BaseException:
            self.close()
            raise

    def _send(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        if not self.is_open():  # uvloop has an error of another kind for this
            raise ConnectionError("the connection is closed")
        head = self._http.send(h11.Request(method=b"GET", target=target, headers=headers))
        assert head is not None
        self._http.send(h11.EndOfMessage())
        self._transport.write(head)

    async def _head(self) -> h11.Response:
        taken = interim = 0
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                return event
            if isinstance(event, h11.InformationalResponse) and interim < MAX_INTERIM_RESPONSES:
                interim += 1
                continue
            if event is not h11.NEED_DATA or taken > MAX_HEAD_BYTES:
                raise h11.RemoteProtocolError("not a response, or too much before it")
            data = await self._read(HEAD_READ_BYTES)
            taken += len(data)
            self._http.receive_data(data)

    async def body(self) -> AsyncGenerator[bytes | bytearray, None]:
        """The body in pieces. Raises what `get` raises."""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._read())
            elif isinstance(event, h11.Data):
                yield event.data
            else:
                return

    async def _read(self, most: int | None = None) -> bytes:
        """What was received, at most `most` bytes; nothing once the server has closed."""
        while not self._received:
            if self._error is not None:
                raise ConnectionError("the connection broke") from self._error
            if self._ended:
                return b""
            self._news.clear()
            await self._news.wait()
        data = self._received.popleft()
        if most is not None and len(data) > most:
            self._received.appendleft(data[most:])
            data = data[:most]
        self._held -= len(data)
        if self._paused and self._held <= HIGH_WATER_BYTES and not self._ended:
            self._paused = False
            self._transport.resume_reading()
        return data

    def recycle(self) -> bool:
        """Make ready for another request; False if the last response has not ended exactly."""
        done = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        if not done or self._http.trailing_data[0] or self._received:
            return False
        self._http.start_next_cycle()
        return self.is_open()

    def is_open(self) -> bool:
        """Whether neither side has closed."""
        return not self._ended and not self._transport.is_closing()

    def close(self) -> None:
        """Close at once; a farewell would keep the connection as long as the server likes."""
        self._transport.abort()


class IdleConnections:
    """Connections that may serve another request, oldest first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[tuple[float, Origin, Connection]] = []

    def take(self, origin: Origin) -> Connection | None:
        """The connection to `origin` that was used last, if one still stands."""
        self._drop(time.monotonic() - KEEP_ALIVE_S)
        for entry in [entry for entry in reversed(self._kept) if entry[1] == origin]:
            self._kept.remove(entry)
            if entry[2].is_open():
                return entry[2]
            entry[2].close()
        return None

    def put(self, origin: Origin, connection: Connection) -> None:
        """Keep `connection`, or close it if its last response was not read to the end."""
        self._drop(time.monotonic() - KEEP_ALIVE_S)
        if not connection.recycle():
            connection.close()
            return
        self._kept.append((time.monotonic(), origin, connection))
        if len(self._kept) > self._limit:
            self._kept.pop(0)[2].close()

    def close(self) -> None:
        """Close all."""
        self._drop(math.inf)

    def _drop(self, before: float) -> None:
        while self._kept and self._kept[0][0] < before:
            self._kept.pop(0)[2].close()
