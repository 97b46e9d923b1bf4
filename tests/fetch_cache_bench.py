"""A fetcher with a cache, for tests: a real origin, and a clock that the test advances."""

import asyncio
from email.utils import formatdate
from typing import Any

from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import CacheStats, FetchCache
from tests.hostile_origin import HostileOrigin, Visit

MIB = 1 << 20
GROUP = "customers"


class Clock:
    """Both clocks of `time`. They stand still unless the test advances them. The wall clock jumps
    with `ahead_s`, by which it is wrong."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.ahead_s = 0.0

    def time(self) -> float:
        return self.now + self.ahead_s

    def monotonic(self) -> float:
        return self.now - 1_000_000_000

    def date(self, seconds: float = 0) -> str:
        """The time `seconds` from now, as an HTTP date."""
        return formatdate(self.now + seconds, usegmt=True)


class Picture:
    """The resource at one path of the origin. A request with its validator gets a 304.

    `headers` are sent with the picture; `newer` with a 304 (None: the picture's headers).
    """

    def __init__(self, *headers: str, body: bytes = b"picture") -> None:
        self.headers = list(headers)
        self.newer: list[str] | None = None
        self.body = body
        self.visits: list[Visit] = []
        self._may_answer = asyncio.Event()
        self._may_answer.set()

    async def __call__(self, visit: Visit) -> None:
        self._loop = asyncio.get_running_loop()
        self.visits.append(visit)
        await self._may_answer.wait()
        if self._is_known_to(visit):
            lines = self.headers if self.newer is None else self.newer
            await visit.send("\r\n".join(["HTTP/1.1 304 Not Modified", *lines, "", ""]).encode())
        else:
            await visit.respond("200 OK", self.body, *self.headers)

    def hold(self) -> None:
        """Hold all answers until `answer` is called."""
        self._may_answer.clear()

    def answer(self) -> None:
        """Answer all pending and future requests."""
        self._loop.call_soon_threadsafe(self._may_answer.set)

    def _is_known_to(self, visit: Visit) -> bool:
        asked = visit.header("If-None-Match"), visit.header("If-Modified-Since")
        ours = self._field("ETag"), self._field("Last-Modified")
        return any(a and a == b for a, b in zip(asked, ours, strict=True))

    def _field(self, name: str) -> str:
        lines = (line.partition(": ") for line in self.headers)
        return next((value for key, _, value in lines if key == name), "")


class Bench:
    """A fetcher with a cache, a clock, and an origin with one picture."""

    def __init__(self, origin: HostileOrigin, max_bytes: int = MIB) -> None:
        self.origin = origin
        self.clock = Clock()
        self.cache = FetchCache(max_bytes, self.clock)
        self.settings: dict[str, Any] = {"allow_private": True}
        self.url = origin.url("/picture")

    def put(self, *headers: str, body: bytes = b"picture", path: str = "/picture") -> Picture:
        picture = Picture(*headers, body=body)
        self.origin.routes[path] = picture
        return picture

    def fetcher(self, **settings: Any) -> Fetcher:
        return Fetcher(FetchSettings(**{**self.settings, **settings}), cache=self.cache)

    def outcome(self, fetches: int = 2) -> CacheStats:
        """Fetch the picture `fetches` times in sequence; returns the statistics of the cache."""

        async def fetch() -> None:
            async with self.fetcher() as fetcher:
                for _ in range(fetches):
                    await fetcher.fetch(self.url, GROUP)

        asyncio.run(fetch())
        return self.cache.stats()
