"""Sends GET requests with aiohttp: keeps connections, and limits how much of a response is read.

Each origin has a session of its own, and an origin includes the group of API keys. Otherwise a
skipped handshake would reveal to one group that another had fetched from a host.
"""

import asyncio
import contextlib
import io
import ssl
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
from yarl import URL

from server import __version__
from server.errors import ImageFetchFailed, ImageTooLarge, busy_for_files
from server.ingest.freshness import HttpHeader
from server.ingest.guard import GuardedResolver
from server.ingest.http_protocol import BoundedConnector, NoResponse

KEEP_ALIVE_S = 15.0
# RFC 8305 (happy eyeballs), section 5: how long to wait before the next address is tried too.
STAGGER_S = 0.25
MAX_FIELD_BYTES = 16 * 1024
MAX_FIELDS = 256
# Reading pauses while twice as much is buffered.
BUFFER_BYTES = 128 * 1024

# Parsing runs on the loop, and takes as long for a piece of one byte as for one of thousands.
MIN_PIECE_BYTES = 256
FREE_PIECES = 1024
PIECES_A_TURN = 64

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None)  # the fetch has a deadline
_HEADERS = {  # they may depend on the URL only: `ingest.freshness` relies on that
    "User-Agent": f"saccade/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}
# Errors that may end an attempt before the server has sent anything.
_NOT_REACHED = (aiohttp.ClientConnectionError, OSError, NoResponse)


class Origin(NamedTuple):
    """Where requests go, and for which group of API keys."""

    scheme: str
    authority: str
    host: str
    group: str


@dataclass
class _Session:
    """aiohttp's session with one origin.

    It holds at most `peak` connections, since it opens one only if each of the existing ones serves
    a request.
    """

    http: aiohttp.ClientSession
    users: int = 0
    peak: int = 0


class HttpClient:
    """Sends GET requests.

    Keeps about `max_idle` idle connections, and closes those of the least recently used origin
    first.
    """

    def __init__(self, resolver: GuardedResolver, max_idle: int) -> None:
        self._resolver = resolver
        self._max_idle = max_idle
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._sessions: OrderedDict[Origin, _Session] = OrderedDict()

    async def close(self) -> None:
        """Close all connections."""
        while self._sessions:
            await self._sessions.popitem()[1].http.close()

    @contextlib.asynccontextmanager
    async def get(
        self, origin: Origin, target: str, conditions: Sequence[HttpHeader]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Request `target`; yields the response, its body unread.

        If the server sends nothing, the request is sent once more, over a new connection.

        Raises:
            ImageUrlBlocked, ImageFetchFailed
            ServerBusy: no file is free for the connection.
        """
        url = URL.build(scheme=origin.scheme, authority=origin.authority, path=target, encoded=True)
        assert url.raw_host == origin.host  # the host that was checked
        headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in conditions]
        for is_last in (False, True):
            async with self._session(origin, is_new=is_last) as session:
                try:
                    response = await session.get(url, headers=headers, allow_redirects=False)
                except aiohttp.ClientSSLError:
                    message = "the secure connection to the image's server failed"
                    raise ImageFetchFailed(message) from None
                except _NOT_REACHED as error:
                    if (busy := busy_for_files(error)) is not None:
                        raise busy from None
                    continue
                except aiohttp.ClientError:
                    message = "the image's server did not send a valid HTTP response"
                    raise ImageFetchFailed(message) from None
                async with response:
                    yield response
                return
        raise ImageFetchFailed("the image's server could not be reached")

    @contextlib.asynccontextmanager
    async def _session(self, origin: Origin, is_new: bool) -> AsyncIterator[aiohttp.ClientSession]:
        """The session with `origin`; with `is_new`, one that has no connection yet."""
        session = replaced = self._sessions.pop(origin, None)
        if session is None or is_new:
            session = _Session(self._make_session(origin))
        self._sessions[origin] = session  # at the end, as the most recently used
        session.users += 1
        session.peak = max(session.peak, session.users)
        try:
            if replaced is not None and replaced is not session and not replaced.users:
                await replaced.http.close()
            yield session.http
        finally:
            session.users -= 1
            if not session.users and self._sessions.get(origin) is not session:
                await session.http.close()
            await self._close_surplus()

    async def _close_surplus(self) -> None:
        idle = sum(session.peak - session.users for session in self._sessions.values())
        surplus = []
        for origin, session in self._sessions.items():  # least recently used first
            if idle <= self._max_idle:
                break
            if not session.users:
                idle -= session.peak
                surplus.append(origin)
        for session in [self._sessions.pop(origin) for origin in surplus]:
            await session.http.close()

    def _make_session(self, origin: Origin) -> aiohttp.ClientSession:
        self._resolver.check_literal(origin.host)  # aiohttp does not resolve addresses
        connector = BoundedConnector(
            resolver=self._resolver,
            use_dns_cache=False,
            ssl=self._tls,
            limit=0,
            keepalive_timeout=KEEP_ALIVE_S,
            happy_eyeballs_delay=STAGGER_S,
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=_NO_TIMEOUT,
            read_bufsize=BUFFER_BYTES,
            max_line_size=MAX_FIELD_BYTES,
            max_field_size=MAX_FIELD_BYTES,
            max_headers=MAX_FIELDS,
        )


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read the body of `response`, of at most `max_bytes`.

    Raises:
        ImageFetchFailed, ImageTooLarge
    """
    # Grows in place and returns its bytes without a copy; joining pieces would copy on the loop.
    body, size, pieces = io.BytesIO(), 0, 0
    content = response.content
    try:
        while not content.at_eof():
            piece, _ = await content.readchunk()
            size, pieces = size + len(piece), pieces + 1
            if size > max_bytes:
                raise too_large(max_bytes)
            if pieces > FREE_PIECES + size // MIN_PIECE_BYTES:
                raise ImageFetchFailed("the image's server sent the image in too many small pieces")
            if pieces % PIECES_A_TURN == 0:
                await asyncio.sleep(0)
            body.write(piece)
        if error := content.exception():
            raise error
    except (aiohttp.ClientError, OSError):
        raise ImageFetchFailed(
            "the connection to the image's server broke in the middle of the image"
        ) from None
    return body.getvalue()


def inflated(data: bytes, max_bytes: int) -> bytes:
    """Decompress `data` (gzip or zlib) to at most `max_bytes`.

    Some object stores serve compressed uploads even to clients that do not accept compression.

    Raises:
        ImageFetchFailed, ImageTooLarge
    """
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        plain = b""
    if len(plain) > max_bytes:
        raise too_large(max_bytes)
    if not inflater.eof:
        raise ImageFetchFailed("the image's server sent invalid compressed data")
    return plain


def too_large(max_bytes: int) -> ImageTooLarge:
    """The error of a body of more than `max_bytes`."""
    return ImageTooLarge(f"the image has more than {max_bytes} bytes, which is the limit")
