"""The tier that replicas share: a Redis or Valkey server.

Its `maxmemory` limits the size, with the policy `allkeys-lru` or `allkeys-lfu`. If the server is
slow, gone or full, lookups are misses: every call has a deadline, and after several failures in a
row no calls are made for a while.
"""

from collections.abc import Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from server.engine.embedding_cache.tier import (
    LENGTH_BYTES,
    MAX_HEAD_BYTES,
    Breaker,
    Counts,
    DamagedEntry,
    Spec,
    check_data,
    check_head,
    checksum,
    head,
    header_length,
)

_CONNECT_TIMEOUT_S = 0.5
_CALL_TIMEOUT_S = 0.5
_SCAN_COUNT = 1000


class SharedTier:
    """The entries of one model in a store at a `redis://`, `rediss://` or `unix://` URL."""

    name = "shared"

    def __init__(self, url: str, namespace: str, connections: int) -> None:
        """Raises ValueError if `url` is invalid. Does not connect yet."""
        self.counts = Counts()
        self.breaker = Breaker()
        self._prefix = f"saccade:embedding:{namespace}:"
        self._redis: Any = redis.Redis.from_url(
            url,
            socket_timeout=_CALL_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            max_connections=connections,
            health_check_interval=0,
        )

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        try:
            with _as_os_errors():
                value = self._get(self._prefix + key, MAX_HEAD_BYTES + spec.nbytes)
            if not value:
                return False
            self._copy(memoryview(value), key, spec, into)
        except DamagedEntry:
            self.delete(key)
            raise
        return True

    def _get(self, name: str, most: int) -> bytes:
        """The value of a key, truncated to `most` + 1 bytes; empty if there is none."""
        try:
            value: bytes = self._redis.getrange(name, 0, most)
        except redis.ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                raise DamagedEntry("the entry has the wrong Redis type") from None
            raise
        return value

    @staticmethod
    def _copy(value: memoryview, key: str, spec: Spec, into: Sequence[memoryview]) -> None:
        start = LENGTH_BYTES + header_length(value)
        digest = check_head(bytes(value[LENGTH_BYTES:start]), key, spec)
        data = value[start:]
        if len(data) != spec.nbytes:
            raise DamagedEntry("the entry has the wrong length")
        check_data([data], digest)
        at = 0
        for piece in into:
            piece[:] = data[at : at + len(piece)]
            at += len(piece)

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        start = head(key, spec, checksum(data))
        with _as_os_errors():
            self._redis.set(self._prefix + key, b"".join((start, *data)))

    def delete(self, key: str) -> None:
        with _as_os_errors():
            self._redis.delete(self._prefix + key)

    def clear(self) -> None:
        with _as_os_errors():
            found = self._redis.scan_iter(f"{self._prefix}*", _SCAN_COUNT)
            for key in found:
                self._redis.unlink(key)

    def size(self) -> dict[str, int | None]:
        return {"entries": None, "bytes": None, "max_bytes": None}

    def close(self) -> None:
        self._redis.close()


class _as_os_errors:
    """Raises the library's errors as OSError without their message, which may contain the
    password."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, redis.RedisError):
            raise OSError(type(error).__name__) from None
