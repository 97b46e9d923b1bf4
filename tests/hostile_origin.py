"""A web server that misbehaves, on loopback, for tests of fetching.

    with HostileOrigin() as origin:
        fetch(origin.url("/drip"))
        assert origin.open == 0

`BEHAVIOURS` maps paths to behaviours; tests add more to `origin.routes`.
"""

import asyncio
import contextlib
import functools
import gzip
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

WAIT_S = 30.0
CHUNK = b"x" * 65536


@dataclass
class Visit:
    """One request, and the connection it came on."""

    head: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def path(self) -> str:
        return urlsplit(self.head.split()[1]).path

    def query(self, name: str, default: str = "") -> str:
        return parse_qs(urlsplit(self.head.split()[1]).query).get(name, [default])[0]

    def header(self, name: str) -> str:
        for line in self.head.split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return ""

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def respond(self, status: str = "200 OK", body: bytes = b"", *headers: str) -> None:
        """A complete, valid response; the connection stays open."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode(), body)

    async def begin(self, *headers: str) -> None:
        """The head of a chunked response."""
        lines = ["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *headers, "", ""]
        await self.send("\r\n".join(lines).encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self) -> None:
        self.writer.transport.abort()


Behaviour = Callable[[Visit], Awaitable[None]]


async def ok(visit: Visit) -> None:
    """`?size=` bytes, after `?delay=` seconds."""
    await asyncio.sleep(float(visit.query("delay", "0")))
    await visit.respond("200 OK", b"x" * int(visit.query("size", "1000")))


async def chunked(visit: Visit) -> None:
    """`?size=` bytes in chunks of `?piece=` bytes."""
    size, piece = int(visit.query("size", "1000")), int(visit.query("piece", "100"))
    await visit.begin()
    frame = b"%x\r\n%b\r\n" % (piece, b"x" * piece)
    await visit.send(frame * (size // piece), b"0\r\n\r\n")


async def status(visit: Visit) -> None:
    code = visit.query("code")
    if code in ("204", "304"):  # these have no body
        await visit.send(f"HTTP/1.1 {code} Whatever\r\n\r\n".encode())
    else:
        await visit.respond(f"{code} Whatever", b"a secret")


async def html(visit: Visit) -> None:
    await visit.respond("200 OK", b"<html>not here</html>", "Content-Type: text/html")


async def redirect(visit: Visit) -> None:
    """To `?to=`, with an endless body."""
    to = f"Location: {visit.query('to')}"
    await visit.send(f"HTTP/1.1 302 Found\r\n{to}\r\nContent-Length: 10\r\n\r\n".encode())


async def redirect_onwards(visit: Visit) -> None:
    """`?times=` times, then to /ok."""
    times = int(visit.query("times"))
    to = f"?times={times - 1}" if times > 1 else "ok"
    await visit.respond("307 Temporary Redirect", b"", f"Location: {to}")


async def redirect_loop(visit: Visit) -> None:
    await visit.respond("301 Moved Permanently", b"", "Location: /redirect-loop")


async def redirect_nowhere(visit: Visit) -> None:
    await visit.respond("302 Found")


async def drip(visit: Visit) -> None:
    """A body sent one byte at a time, which would take weeks."""
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 40000000\r\n\r\n")
    while True:
        await visit.send(b"x")
        await asyncio.sleep(0.05)


async def drip_head(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        await visit.send(b"x")
        await asyncio.sleep(0.05)


async def endless(visit: Visit) -> None:
    await visit.begin()
    while True:
        await visit.chunk(CHUNK)


async def endless_without_framing(visit: Visit) -> None:
    await visit.send(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        await visit.send(CHUNK)


async def crumbs(visit: Visit) -> None:
    """An endless body of one-byte chunks, which is expensive to parse."""
    await visit.begin()
    while True:
        await visit.send(b"1\r\nx\r\n" * 10_000)


async def announces_too_much(visit: Visit) -> None:
    """Announces a body of `?size=` bytes and sends none of it."""
    size = visit.query("size")
    await visit.send(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
    await visit.reader.read()


async def shorter_than_announced(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 400)
    visit.writer.close()


async def longer_than_announced(visit: Visit) -> None:
    """The data after the body looks like the response to a request that was not sent yet."""
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody" + forged)


async def two_lengths(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!")


async def huge_length(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % (b"9" * 5000))


@functools.cache
def bomb() -> bytes:
    """50 MB of zeros in 50 kB."""
    return gzip.compress(bytes(50_000_000))


async def gzip_bomb(visit: Visit) -> None:
    await visit.respond("200 OK", bomb(), "Content-Encoding: gzip")


async def compressed(visit: Visit) -> None:
    """`?size=` bytes, labelled as compressed with `?as=`, and truncated by `?cut=` bytes."""
    data = gzip.compress(b"x" * int(visit.query("size", "1000")))
    data = data[: len(data) - int(visit.query("cut", "0"))]
    await visit.respond("200 OK", data, f"Content-Encoding: {visit.query('as', 'gzip')}")


async def reset_in_body(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 400)
    await asyncio.sleep(0.05)
    visit.reset()


async def reset(visit: Visit) -> None:
    visit.reset()


async def silent(visit: Visit) -> None:
    """Never answers; returns when the client disconnects."""
    await visit.reader.read()


async def many_headers(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await visit.send(b"X-Header: x\r\n" * 1000)


async def interim_flood(visit: Visit) -> None:
    while True:
        await visit.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


async def responses_behind_a_response(visit: Visit) -> None:
    """Unsolicited responses, sent together with the first."""
    first = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b"x" * 10_000
    await visit.send(first + b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)


async def long_head(visit: Visit) -> None:
    """A hundred header fields of 1,000 bytes."""
    await visit.send(b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 100)
    await visit.reader.read()


async def half_a_head(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    visit.writer.close()


async def bad_chunks(visit: Visit) -> None:
    await visit.begin()
    await visit.chunk(b"x" * 100)
    await visit.send(b"what?\r\n")
    await visit.reader.read()


async def reset_without_framing(visit: Visit) -> None:
    """A body without a length, whose connection is reset."""
    await visit.send(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 400)
    await asyncio.sleep(0.05)
    socket_ = visit.writer.get_extra_info("socket")
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    visit.reset()


async def garbage(visit: Visit) -> None:
    await visit.send(b"220 mail.example ESMTP\r\n\r\n")
    await visit.reader.read()


async def endless_field(visit: Visit) -> None:
    """A header field without end."""
    await visit.send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        await visit.send(CHUNK)


async def interim_drip(visit: Visit) -> None:
    """Interim responses without end, each sent alone."""
    while True:
        await visit.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.01)


async def negative_length(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nbody!")


async def two_framings(visit: Visit) -> None:
    """A length and chunks; proxies differ in which of them they believe."""
    await visit.begin("Content-Length: 4")
    await visit.send(b"5\r\nbody!\r\n0\r\n\r\n")


async def endless_chunk_extension(visit: Visit) -> None:
    await visit.begin()
    await visit.send(b"1;")
    while True:
        await visit.send(CHUNK)


async def endless_chunk_size(visit: Visit) -> None:
    await visit.begin()
    while True:
        await visit.send(b"0" * 65536)


async def huge_chunk(visit: Visit) -> None:
    """A chunk of 16 EiB."""
    await visit.begin()
    await visit.send(b"f" * 16 + b"\r\n")
    while True:
        await visit.send(CHUNK)


async def endless_trailers(visit: Visit) -> None:
    await visit.begin()
    await visit.send(b"4\r\nbody\r\n0\r\n")
    while True:
        await visit.send(b"X-Trailer: x\r\n" * 1000)


async def endless_trailer(visit: Visit) -> None:
    await visit.begin()
    await visit.send(b"4\r\nbody\r\n0\r\nX: ")
    while True:
        await visit.send(CHUNK)


async def sets_cookie(visit: Visit) -> None:
    await visit.respond("200 OK", visit.head.encode(), "Set-Cookie: who=you")


BEHAVIOURS: dict[str, Behaviour] = {
    "/ok": ok,
    "/chunked": chunked,
    "/status": status,
    "/html": html,
    "/redirect": redirect,
    "/redirect-onwards": redirect_onwards,
    "/redirect-loop": redirect_loop,
    "/redirect-nowhere": redirect_nowhere,
    "/drip": drip,
    "/drip-head": drip_head,
    "/endless": endless,
    "/endless-without-framing": endless_without_framing,
    "/crumbs": crumbs,
    "/announces-too-much": announces_too_much,
    "/shorter-than-announced": shorter_than_announced,
    "/longer-than-announced": longer_than_announced,
    "/two-lengths": two_lengths,
    "/huge-length": huge_length,
    "/gzip-bomb": gzip_bomb,
    "/compressed": compressed,
    "/reset-in-body": reset_in_body,
    "/reset": reset,
    "/silent": silent,
    "/many-headers": many_headers,
    "/interim-flood": interim_flood,
    "/responses-behind-a-response": responses_behind_a_response,
    "/long-head": long_head,
    "/half-a-head": half_a_head,
    "/bad-chunks": bad_chunks,
    "/reset-without-framing": reset_without_framing,
    "/garbage": garbage,
    "/sets-cookie": sets_cookie,
    "/endless-field": endless_field,
    "/interim-drip": interim_drip,
    "/negative-length": negative_length,
    "/two-framings": two_framings,
    "/endless-chunk-extension": endless_chunk_extension,
    "/endless-chunk-size": endless_chunk_size,
    "/huge-chunk": huge_chunk,
    "/endless-trailers": endless_trailers,
    "/endless-trailer": endless_trailer,
}


class HostileOrigin:
    """The server, in a separate thread during its `with` block.

    Attributes:
        connections: number of accepted connections.
        open: number of open connections.
        heads: the heads of the requests, in order.
        busy, busiest: current and highest number of requests in progress.
        resets_first: number of connections that are reset right after they are accepted.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.host = host
        self.port = port
        self.routes = dict(BEHAVIOURS)
        self.connections = self.open = self.busy = self.busiest = self.resets_first = 0
        self.heads: list[str] = []
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def url(self, path: str, host: str | None = None) -> str:
        name = host or (f"[{self.host}]" if ":" in self.host else self.host)
        return f"{'https' if self._tls else 'http'}://{name}:{self.port}{path}"

    def wait(self, condition: Callable[[Self], bool]) -> None:
        """Return when `condition` holds; fails the test if it does not within a time limit."""
        end = time.monotonic() + WAIT_S
        while not condition(self):
            assert time.monotonic() < end, "the condition of the origin did not become true"
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def _run(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            if self.connections <= self.resets_first:
                writer.transport.abort()
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, ssl.SSLError):
                while not writer.is_closing():
                    head = await reader.readuntil(b"\r\n\r\n")
                    await self._answer(Visit(head.decode(), reader, writer))
        finally:
            self.open -= 1
            writer.transport.abort()

    async def _answer(self, visit: Visit) -> None:
        self.heads.append(visit.head)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            await self.routes[visit.path](visit)
        finally:
            self.busy -= 1
