"""Fetches http(s) images: one deadline, one limit of bytes, and the guard on every hop."""

import asyncio
import functools
import ssl
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import h11
import httpx

from server import __version__
from server.errors import (
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidImageUrl,
    SaccadeError,
    ServerBusy,
)
from server.ingest.connection import Connection, IdleConnections, Origin
from server.ingest.dial import Dialler, Resolver, SystemResolver
from server.ingest.fetch_body import FAILURES, inflated, read_body, too_large
from server.ingest.fetch_cache import Answer, FetchCache, Key
from server.ingest.freshness import Header
from server.ingest.guard import Policy, canonical, check_host, check_url
from server.ingest.slots import Slots
from server.request import tenant

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})


@dataclass(frozen=True)
class FetchSettings:
    """Limits of a fetch, and where it may lead.

    Attributes:
        timeout_s: the deadline of a whole fetch, from its place in the queue to the last byte.
        max_bytes: the largest image as it was encoded, in bytes.
        max_redirects: how often one image may be somewhere else.
        max_connections: fetches at a time; as many idle connections are kept besides.
        max_connections_per_host: fetches at a time from one host.
        allow_private, allowed, only_hosts: as in `guard.Policy.of`.
    """

    timeout_s: float = 10.0
    max_bytes: int = 50 << 20
    max_redirects: int = 3
    max_connections: int = 128
    max_connections_per_host: int = 16
    allow_private: bool = False
    allowed: tuple[str, ...] = ()
    only_hosts: tuple[str, ...] = ()


class _Wanted(NamedTuple):
    """What is fetched, and for which group; who wants the same shares a fetch."""

    group: str
    url: str
    max_bytes: int


@dataclass
class _Flight:
    """A fetch that all who ask for the same image at the same time wait for."""

    task: asyncio.Task[bytes]
    waiters: int = 0


class Fetcher:
    """Fetches images while its `async with` lasts.

    Attributes:
        cache: what it keeps of them, if anything.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        cache: FetchCache | None = None,
        resolve: Resolver | None = None,
    ) -> None:
        """Raises ValueError if an entry of `allowed` or `only_hosts` is of no use."""
        self.cache = cache
        self._settings = settings
        self._policy = Policy.of(settings.allow_private, settings.allowed, settings.only_hosts)
        self._system_resolver = SystemResolver()
        self._dialler = Dialler(self._policy, resolve or self._system_resolver)
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._slots = Slots(settings.max_connections, settings.max_connections_per_host)
        self._idle = IdleConnections(settings.max_connections)
        self._flights: dict[_Wanted, _Flight] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._idle.close()
        self._system_resolver.close()

    async def fetch(self, url: str, max_bytes: int | None = None) -> bytes:
        """The file at `url`, of at most `max_bytes` (default: that of the settings).

        Who asks for what is being fetched already for the same group waits for that fetch, under
        its deadline.

        Raises:
            InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout, ImageTooLarge
            ServerBusy: the fetcher was closed meanwhile.
        """
        most = self._settings.max_bytes if max_bytes is None else max_bytes
        wanted = _Wanted(tenant.group(), url, most)
        flight = self._flights.get(wanted) or self._start(wanted)
        flight.waiters += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
                self._forget(wanted, flight)
        if flight.task.cancelled():
            raise ServerBusy("the server is shutting down", part=url)
        try:
            return flight.task.result()
        except SaccadeError as error:  # one for each waiter: they go different ways
            raise type(error)(error.message, part=url) from None

    def _start(self, wanted: _Wanted) -> _Flight:
        # In a context of its own: the first request's data must not stay as long as the flight.
        task = asyncio.get_running_loop().create_task(self._load(wanted), context=Context())
        flight = self._flights[wanted] = _Flight(task)
        task.add_done_callback(lambda _: self._forget(wanted, flight))
        return flight

    def _forget(self, wanted: _Wanted, flight: _Flight) -> None:
        if self._flights.get(wanted) is flight:
            del self._flights[wanted]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # or the loop would report it if no waiter is left

    async def _load(self, wanted: _Wanted) -> bytes:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(wanted)
        except TimeoutError:
            message = f"the image was not fetched within {timeout_s:g} s"
            raise ImageFetchTimeout(message) from None

    async def _follow(self, wanted: _Wanted) -> bytes:
        url = check_url(wanted.url)
        redirects = self._settings.max_redirects
        for _ in range(redirects + 1):
            found = await self._hop(wanted.group, url, wanted.max_bytes)
            if isinstance(found, bytes):
                return found
            url = found
        raise ImageFetchFailed(f"the image's server redirected more than {redirects} times")

    async def _hop(self, group: str, url: httpx.URL, max_bytes: int) -> bytes | httpx.URL:
        """The body at `url`, or where it is instead."""
        check_host(_host(url), self._policy)  # also of what is kept
        ask = functools.partial(self._get, group, url, max_bytes)
        if self.cache is None:
            answer = await ask(())
            return answer.body if isinstance(answer, Answer) else answer
        found = await self.cache.get(Key(group, url.scheme, url.netloc, url.raw_path), ask)
        if isinstance(found, bytes) and len(found) > max_bytes:
            raise too_large(max_bytes)
        return found

    async def _get(
        self, group: str, url: httpx.URL, max_bytes: int, conditions: Sequence[Header]
    ) -> Answer | httpx.URL:
        """The answer at `url`, its body not compressed, or where the image is instead."""
        host = _host(url)
        origin = (url.scheme, host, url.port or (443 if url.scheme == "https" else 80), group)
        async with self._slots.take(canonical(host)):
            connection, response = await self._ask(origin, url, conditions)
            try:
                if response.status_code in _REDIRECTS and _header(response, b"location"):
                    return _redirected(url, response)
                if response.status_code == 304 and conditions:
                    await read_body(connection, 0)  # there is none, but it has an end
                    return Answer(304, list(response.headers), b"")
                compressed = _check(response, max_bytes)
                body = await read_body(connection, max_bytes)
            finally:
                self._idle.put(origin, connection)
        if compressed:
            body = await asyncio.to_thread(inflated, body, max_bytes)
        return Answer(200, list(response.headers), body)

    async def _ask(
        self, origin: Origin, url: httpx.URL, conditions: Sequence[Header]
    ) -> tuple[Connection, h11.Response]:
        """Send the request; once more, by a new connection, if the server has said nothing."""
        scheme, host, port, _ = origin
        tls = self._tls if scheme == "https" else None
        headers = [*_headers(url), *conditions]
        for is_last in (False, True):
            connection = None if is_last else self._idle.take(origin)
            try:
                connection = connection or await self._dialler.connect(host, port, tls)
                return connection, await connection.get(url.raw_path, headers)
            except ssl.SSLError:
                message = "no secure connection to the image's server could be made"
                raise ImageFetchFailed(message) from None
            except FAILURES:
                if connection is not None and connection.heard:
                    raise ImageFetchFailed("the image's server did not answer in HTTP") from None
                if is_last:
                    break
        raise ImageFetchFailed("the image's server could not be reached")


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")


def _headers(url: httpx.URL) -> list[Header]:
    return [  # nothing but the URL may change them: `ingest.freshness` relies on it
        (b"Host", url.netloc),
        (b"User-Agent", f"saccade/{__version__}".encode()),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", b"identity"),
    ]


def _header(response: h11.Response, name: bytes) -> str:
    return next((value for key, value in response.headers if key == name), b"").decode("latin-1")


def _redirected(url: httpx.URL, response: h11.Response) -> httpx.URL:
    try:
        target = url.join(_header(response, b"location").encode("latin-1").decode())
        if target.scheme not in ("http", "https"):
            raise ImageUrlBlocked(
                "the image's server redirected to a URL that is not http or https"
            )
        return check_url(str(target))
    except (httpx.InvalidURL, ValueError, InvalidImageUrl):
        raise ImageFetchFailed("the image's server redirected to an invalid URL") from None


def _check(response: h11.Response, max_bytes: int) -> bool:
    """Whether the body is compressed. Raises if it is not worth reading."""
    if response.status_code != 200:
        raise ImageFetchFailed(f"the image's server answered with status {response.status_code}")
    length = int(_header(response, b"content-length") or 0)
    if length > max_bytes:
        raise ImageTooLarge(f"the image has {length} bytes, the limit is {max_bytes} bytes")
    encoding = _header(response, b"content-encoding").lower()
    if encoding not in _COMPRESSED | {"", "identity"}:
        raise ImageFetchFailed("the image's server compressed it, which it was not asked to")
    return encoding in _COMPRESSED
