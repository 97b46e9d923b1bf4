"""Keeps fetched images in memory, as HTTP caching (RFC 9111) allows.

Each group of API keys has a private cache of its own: an image fetched for one group is never
served to another, even if publicly cacheable. Otherwise the time of an answer would reveal whether
another group had fetched a URL. Without groups of keys, all requests share one cache.

Only responses with status 200 are kept, each under the URL that it came from. Redirects are always
followed again, so that a cached image is reachable only as long as its redirects lead to it.
Nothing stale is served: if a revalidation fails, the fetch fails.

The cache is used on the event loop; the time of its operations does not grow with a body.

hishel 2.0 was tried and does not do this: it computes a response's age from `Date` alone, so that
`max-age=60` with `Age: 60` and contradictory lifetimes are served as fresh, and it gives everything
with a `Last-Modified` a heuristic lifetime, which no option turns off. It has adapters for httpx
and requests but not for aiohttp, stores in SQLite and Redis only, and has no clock but
`time.time()`.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
from cachetools import LRUCache

from server.ingest.clock import Clock
from server.ingest.freshness import HttpHeader, ResponseHead
from server.telemetry import metrics

# The largest share of the cache that one image may take.
LARGEST_SHARE = 8
# Most bytes of Python objects in an entry, besides those that are counted.
ENTRY_BYTES = 2048


class CacheKey(NamedTuple):
    """The group of API keys that a request is sent for, and all parts of the request that vary."""

    group: str
    scheme: str
    authority: bytes
    target: bytes


@dataclass(frozen=True)
class FetchedResponse:
    """A response with status 200; or with 304 and no body, if a condition was sent."""

    status: int
    headers: Sequence[HttpHeader]
    body: bytes = field(repr=False)


Ask = Callable[[Sequence[HttpHeader]], Awaitable[FetchedResponse | httpx.URL]]
"""(conditions) -> the response to a request with these fields, or the URL that it redirects to."""


@dataclass(frozen=True)
class _CachedResponse:
    """`stale_at` is in seconds on the monotonic clock; `size` is in bytes, of the whole entry."""

    head: ResponseHead
    body: bytes = field(repr=False)
    stale_at: float
    size: int


@dataclass(frozen=True)
class CacheStats:
    """`hits` were served without a request, `revalidated` were confirmed by the image's server, and
    `misses` were fetched."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    revalidated: int


class FetchCache:
    """Keeps images of at most `max_bytes` in total, and evicts the least recently used first."""

    def __init__(self, max_bytes: int, clock: Clock = time) -> None:
        self._clock = clock
        self._entries: LRUCache[CacheKey, _CachedResponse] = LRUCache(
            max_bytes, lambda entry: entry.size
        )
        self._hits = self._misses = self._revalidated = 0

    async def get(self, key: CacheKey, ask: Ask) -> bytes | httpx.URL:
        """The image of `key`, or the URL that it redirects to. Raises what `ask` raises."""
        entry = self._entries.get(key)
        if entry is not None and self._clock.monotonic() < entry.stale_at:
            self._hits += 1
            metrics.fetch_cache_requests.labels("hit").inc()
            return entry.body
        asked_at = self._clock.monotonic()
        response = await ask(entry.head.conditions() if entry else ())
        if entry is not None and isinstance(response, FetchedResponse) and response.status == 304:
            newer = ResponseHead.of(response.headers)
            if entry.head.is_confirmed_by(newer):
                self._keep(key, entry.head.updated(newer), entry.body, asked_at)
                self._revalidated += 1
                metrics.fetch_cache_requests.labels("revalidated").inc()
                return entry.body
            response = await ask(())
        if isinstance(response, httpx.URL):
            return response
        is_kept = self._keep(key, ResponseHead.of(response.headers), response.body, asked_at)
        self._misses += 1
        metrics.fetch_cache_requests.labels("miss" if is_kept else "bypass").inc()
        return response.body

    def stats(self) -> CacheStats:
        """The size of the cache, and its hits and misses since it was created."""
        return CacheStats(
            entries=len(self._entries),
            bytes=int(self._entries.currsize),
            max_bytes=int(self._entries.maxsize),
            hits=self._hits,
            misses=self._misses,
            revalidated=self._revalidated,
        )

    def clear(self) -> None:
        """Forget all images."""
        self._entries.clear()
        metrics.fetch_cache_bytes.set(0)

    def _keep(self, key: CacheKey, head: ResponseHead, body: bytes, asked_at: float) -> bool:
        """Replace the entry of `key`, or remove it if the response may not or need not be kept."""
        entry = self._entry(key, head, body, asked_at)
        if entry is not None:
            self._entries[key] = entry
        else:
            self._entries.pop(key, None)
        metrics.fetch_cache_bytes.set(self._entries.currsize)
        return entry is not None

    def _entry(
        self, key: CacheKey, head: ResponseHead, body: bytes, asked_at: float
    ) -> _CachedResponse | None:
        size = ENTRY_BYTES + sum(map(len, key)) + head.size + len(body)
        if size > self._entries.maxsize / LARGEST_SHARE or not head.may_be_kept():
            return None
        now = self._clock.monotonic()
        fresh_s = head.fresh_s(self._clock.time(), now - asked_at)
        if fresh_s <= 0 and not head.conditions():
            return None
        return _CachedResponse(head, body, now + fresh_s, size)
