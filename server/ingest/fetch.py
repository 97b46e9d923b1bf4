"""Fetches http(s) images, with one deadline, one byte limit, and the guard on every hop."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import aiohttp
import httpx

from server.errors import (
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidImageUrl,
    SaccadeError,
    ServerBusy,
)
from server.ingest.fetch_cache import CacheKey, FetchCache, FetchedResponse
from server.ingest.freshness import HttpHeader
from server.ingest.guard import (
    Address,
    GuardedResolver,
    Lookup,
    Policy,
    SystemLookup,
    canonical,
    check_host,
    check_url,
)
from server.ingest.http_client import HttpClient, Origin, inflated, read_body, too_large

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})


@dataclass(frozen=True)
class FetchSettings:
    """Limits of fetches, and the hosts that they may reach.

    Attributes:
        timeout_s: the deadline of a whole fetch in seconds, including the wait for a slot.
        max_bytes: the largest image file, in bytes.
        max_redirects: how many redirects are followed for one image.
        max_connections: concurrent fetches; about as many idle connections are kept in addition.
        max_connections_per_host: concurrent fetches from one host.
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


class _FlightKey(NamedTuple):
    """Identifies a fetch. Callers with the same key share a flight."""

    group: str
    url: str
    max_bytes: int


OnSize = Callable[[int], None]


@dataclass(eq=False)
class _Flight:
    """A fetch in progress, with the number of callers that wait for it. `size` is what the server
    announced, in bytes; `on_size` are told of it."""

    key: _FlightKey
    task: asyncio.Task[bytes] = field(init=False)
    waiters: int = 0
    size: int | None = None
    on_size: list[OnSize] = field(default_factory=list)

    def announce(self, size: int) -> None:
        """Note the size of the file."""
        self.size = size
        for tell in self.on_size:
            tell(size)

    def tell(self, on_size: OnSize) -> None:
        """Call `on_size` with the size of the file once it is known."""
        if self.size is None:
            self.on_size.append(on_size)
        else:
            on_size(self.size)


class Fetcher:
    """Fetches images while its `async with` block is open.

    Attributes:
        cache: the cache of fetched images; None if none are cached.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        cache: FetchCache | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        """Raises ValueError if an entry of `allowed` or `only_hosts` is invalid."""
        self.cache = cache
        self._settings = settings
        self._policy = Policy.of(settings.allow_private, settings.allowed, settings.only_hosts)
        self._system_lookup = SystemLookup()
        self._slots = _Slots(settings.max_connections, settings.max_connections_per_host)
        resolver = GuardedResolver(
            self._policy, functools.partial(_without_slot, lookup or self._system_lookup)
        )
        self._http = HttpClient(resolver, max_idle=settings.max_connections)
        self._flights: dict[_FlightKey, _Flight] = {}

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
        await self._http.close()
        await self._system_lookup.close()

    async def fetch(
        self,
        url: str,
        group: str,
        max_bytes: int | None = None,
        on_size: OnSize = lambda size: None,
    ) -> bytes:
        """Fetch the file at `url`, of at most `max_bytes` (default: the limit in the settings).
        `on_size` is called before the file is read, if its server announces the size.

        Callers of the same `group` of API keys that ask for the same file at the same time share
        one fetch, under the deadline of the first. It is cancelled when all of them have left.

        Raises:
            InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout, ImageTooLarge
            ServerBusy: the fetcher was closed during the fetch.
        """
        most = self._settings.max_bytes if max_bytes is None else max_bytes
        key = _FlightKey(group, url, most)
        flight = self._flights.get(key) or self._start(key)
        flight.waiters += 1
        flight.tell(on_size)
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight)
        if flight.task.cancelled():
            raise ServerBusy("the server is shutting down")
        try:
            return flight.task.result()
        except SaccadeError as error:  # a new one for each waiter, which adds its own `param`
            raise type(error)(error.message) from None

    def _start(self, key: _FlightKey) -> _Flight:
        # In an empty context, so that the flight does not keep the first request's data alive.
        flight = self._flights[key] = _Flight(key)
        task = asyncio.get_running_loop().create_task(self._load(flight), context=Context())
        task.add_done_callback(lambda _: self._forget(key, flight))
        flight.task = task
        return flight

    def _forget(self, key: _FlightKey, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # marks it as retrieved: without waiters, the loop would log it

    async def _load(self, flight: _Flight) -> bytes:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(flight)
        except TimeoutError:
            message = f"the image was not fetched within {timeout_s:g} s"
            raise ImageFetchTimeout(message) from None

    async def _follow(self, flight: _Flight) -> bytes:
        url = check_url(flight.key.url)
        redirects = self._settings.max_redirects
        for _ in range(redirects + 1):
            found = await self._hop(flight, url)
            if isinstance(found, bytes):
                return found
            url = found
        raise ImageFetchFailed(f"the image's server redirected more than {redirects} times")

    async def _hop(self, flight: _Flight, url: httpx.URL) -> bytes | httpx.URL:
        """The body at `url`, or the URL that it redirects to."""
        group, _, max_bytes = flight.key
        check_host(_host(url), self._policy)  # also before a cached image is served
        ask = functools.partial(self._get, flight, url)
        if self.cache is None:
            response = await ask(())
            return response.body if isinstance(response, FetchedResponse) else response
        found = await self.cache.get(CacheKey(group, url.scheme, url.netloc, url.raw_path), ask)
        if isinstance(found, bytes) and len(found) > max_bytes:
            raise too_large(max_bytes)
        return found

    async def _get(
        self, flight: _Flight, url: httpx.URL, conditions: Sequence[HttpHeader]
    ) -> FetchedResponse | httpx.URL:
        """The response at `url`, with its body decompressed, or the URL that it redirects to."""
        host = _host(url)
        group, _, max_bytes = flight.key
        origin = Origin(url.scheme, url.netloc.decode("ascii"), host, group)
        target = url.raw_path.decode("ascii")
        async with (
            self._slots.take(canonical(host)),
            self._http.get(origin, target, conditions) as response,
        ):
            location = _field(response, b"location")
            if response.status in _REDIRECTS and location:
                return _redirected(url, location)
            headers = [(name.lower(), value) for name, value in response.raw_headers]
            if response.status == 304 and conditions:
                return FetchedResponse(304, headers, b"")
            is_compressed = _check(response, max_bytes)
            if response.content_length is not None and not is_compressed:
                flight.announce(response.content_length)
            body = await read_body(response, max_bytes)
        if is_compressed:
            body = await asyncio.to_thread(inflated, body, max_bytes)
        return FetchedResponse(200, headers, body)


@dataclass
class _HostSlots:
    slots: asyncio.Semaphore
    users: int = 0


class _Slot:
    """One of the global slots, held by one fetch, which can give it back for a while."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._is_held = False

    async def take(self) -> None:
        await self._slots.acquire()
        self._is_held = True

    def give_back(self) -> None:
        if self._is_held:
            self._is_held = False
            self._slots.release()


_slot: ContextVar[_Slot] = ContextVar("slot")


async def _without_slot(lookup: Lookup, host: str, port: int) -> list[Address]:
    """Look up `host` for the fetch of this task, which holds no global slot meanwhile. Otherwise, a
    few names whose nameserver does not answer would hold up the fetches from all other hosts."""
    slot = _slot.get()
    slot.give_back()
    found = await lookup(host, port)
    await slot.take()
    return found


class _Slots:
    """Concurrency limits, global and per host."""

    def __init__(self, total: int, per_host: int) -> None:
        self._total = asyncio.Semaphore(total)
        self._per_host = per_host
        self._hosts: dict[str, _HostSlots] = {}

    @contextlib.asynccontextmanager
    async def take(self, host: str) -> AsyncIterator[None]:
        """Hold a slot of `host` and a global one. Waiting for a busy host or for a nameserver holds
        no global slot."""
        entry = self._hosts.setdefault(host, _HostSlots(asyncio.Semaphore(self._per_host)))
        entry.users += 1
        slot = _Slot(self._total)
        _slot.set(slot)  # a fetch has a task and a context of its own
        try:
            async with entry.slots:
                await slot.take()
                yield
        finally:
            slot.give_back()
            entry.users -= 1
            if not entry.users:
                del self._hosts[host]


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")


def _field(response: aiohttp.ClientResponse, name: bytes) -> bytes:
    """The first value of a header field; empty if there is none."""
    return next((value for key, value in response.raw_headers if key.lower() == name), b"")


def _redirected(url: httpx.URL, location: bytes) -> httpx.URL:
    try:
        target = url.join(location.decode())
        if target.scheme not in ("http", "https"):
            raise ImageUrlBlocked(
                "the image's server redirected to a URL that is not http or https"
            )
        return check_url(str(target))
    except (httpx.InvalidURL, ValueError, InvalidImageUrl):
        raise ImageFetchFailed("the image's server redirected to an invalid URL") from None


def _check(response: aiohttp.ClientResponse, max_bytes: int) -> bool:
    """Whether the body is compressed.

    Raises:
        ImageFetchFailed, ImageTooLarge: the response is not a usable image.
    """
    if response.status != 200:
        raise ImageFetchFailed(f"the image's server answered with status {response.status}")
    length = response.content_length or 0
    if length > max_bytes:
        raise ImageTooLarge(f"the image has {length} bytes, the limit is {max_bytes} bytes")
    encoding = _field(response, b"content-encoding").decode("latin-1").lower()
    if encoding not in _COMPRESSED | {"", "identity"}:
        raise ImageFetchFailed("the image's server used an unsupported content encoding")
    return encoding in _COMPRESSED
