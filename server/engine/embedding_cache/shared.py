"""The tier that replicas share: a Redis or Valkey server.

Its `maxmemory` limits the size, with the policy `allkeys-lru` or `allkeys-lfu`. If the server is
slow, gone, full or not a Redis at all, lookups are misses: every call has a deadline, every reply a
longest size, and after several failures in a row no calls are made for a while.
"""

from collections.abc import Sequence
from typing import Any

import redis

from server.engine.embedding_cache.redis_connection import Allowance, bounded_pool
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

# The longest time of a call, which may have to connect first, and of its bytes: a slower network is
# slower than the encoder.
_CALL_TIMEOUT_S = 1.0
_LEAST_BYTES_PER_S = 20_000_000
_SCAN_COUNT = 1000
# The longest replies without an entry: names found by a scan, and errors.
_MAX_REPLY_BYTES = 1 << 20


class SharedTier:
    """The entries of one model in a store at a `redis://`, `rediss://` or `unix://` URL."""

    name = "shared"

    def __init__(self, url: str, namespace: str, connections: int) -> None:
        """Raises ValueError if `url` is invalid. Does not connect yet."""
        self.counts = Counts()
        self.breaker = Breaker()
        self._prefix = f"saccade:embedding:{namespace}:"
        self._allowance = Allowance()
        self._pool = bounded_pool(url, self._allowance, connections)
        self._redis: Any = redis.Redis(connection_pool=self._pool)
        self._is_closed = False

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        most = MAX_HEAD_BYTES + spec.nbytes
        try:
            with self._call(most):
                value = self._get(self._prefix + key, most)
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
            value = self._redis.getrange(name, 0, most)
        except redis.ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                raise DamagedEntry("the entry has the wrong Redis type") from None
            raise
        if not isinstance(value, bytes):
            raise OSError("the reply is not an entry")
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
        with self._call(spec.nbytes):
            self._redis.set(self._prefix + key, b"".join((start, *data)))

    def delete(self, key: str) -> None:
        with self._call():
            self._redis.delete(self._prefix + key)

    def clear(self) -> None:
        cursor, found = 0, []
        while True:
            with self._call():
                cursor, found = self._redis.scan(cursor, f"{self._prefix}*", _SCAN_COUNT)
            if found:
                with self._call():
                    self._redis.unlink(*found)
            if not cursor:
                return
            if self._is_closed:  # a wrong server may never come to an end
                raise OSError("the tier was closed")

    def size(self) -> dict[str, int | None]:
        return {"entries": None, "bytes": None, "max_bytes": None}

    def close(self) -> None:
        self._is_closed = True
        self._pool.disconnect()

    def _call(self, entry_bytes: int = 0) -> "_Call":
        """The context of one call, which sends or receives an entry of `entry_bytes`."""
        seconds = _CALL_TIMEOUT_S + entry_bytes / _LEAST_BYTES_PER_S
        self._allowance.start(seconds, _MAX_REPLY_BYTES + entry_bytes)
        return _Call()


class _Call:
    """Raises the library's errors as OSError without their message, which may contain the password
    or what the peer sent. What is not Redis makes redis-py raise errors of many other kinds."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError | DamagedEntry):
            raise OSError(type(error).__name__) from None
