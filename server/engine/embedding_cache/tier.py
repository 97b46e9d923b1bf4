"""The tiers below host memory: their protocol, the format of entries, counts, and a circuit
breaker.

An entry is a safetensors file with one tensor, `embedding`. The file's metadata has the entry's key
and the BLAKE3 hash of its data. A reader checks both, and the tensor's type and shape, and does not
use an entry that is damaged or belongs to another key. Nothing is unpickled.
"""

import json
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from blake3 import blake3

from server.telemetry.metrics import EMBEDDING_SECONDS

_TENSOR = "embedding"
_LENGTH = struct.Struct("<Q")
LENGTH_BYTES = _LENGTH.size
# Headers written by `head` have about 300 bytes.
MAX_HEADER_BYTES = 4096
MAX_HEAD_BYTES = LENGTH_BYTES + MAX_HEADER_BYTES

_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


class DamagedEntry(Exception):
    """The stored data is not the requested entry."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The tensor of an entry: `rows` embeddings of `width` numbers; `dtype` is safetensors' name,
    such as "F32"."""

    dtype: str
    rows: int
    width: int

    @property
    def nbytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * self.rows * self.width


def checksum(data: Sequence[memoryview]) -> str:
    """The BLAKE3 hash of the pieces of an entry, in hexadecimal digits."""
    hasher = blake3()
    for piece in data:
        hasher.update(piece)
    return hasher.hexdigest()


def head(key: str, spec: Spec, digest: str) -> bytes:
    """The bytes before the data: the length of the header and the header."""
    header = json.dumps(
        {
            "__metadata__": {"key": key, "blake3": digest},
            _TENSOR: {
                "dtype": spec.dtype,
                "shape": [spec.rows, spec.width],
                "data_offsets": [0, spec.nbytes],
            },
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return _LENGTH.pack(len(header)) + header


def header_length(start: bytes | memoryview) -> int:
    """The length of the header, from the first bytes of an entry.

    Raises:
        DamagedEntry: the entry is too short, or the length is impossible.
    """
    if len(start) < LENGTH_BYTES:
        raise DamagedEntry("the entry is too short")
    (length,) = _LENGTH.unpack_from(start)
    if not 0 < length <= MAX_HEADER_BYTES:
        raise DamagedEntry("the header has an invalid length")
    return int(length)


def check_head(header: bytes, key: str, spec: Spec) -> str:
    """Check that `header` is that of the entry `key`; returns the hash that the data must have.

    Raises:
        DamagedEntry: the header is damaged or belongs to another entry.
    """
    try:
        document = json.loads(header)
        metadata, tensor = document["__metadata__"], document[_TENSOR]
        found = metadata["key"], tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        digest = metadata["blake3"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedEntry("the header is damaged") from None
    if found != (key, spec.dtype, [spec.rows, spec.width], [0, spec.nbytes]):
        raise DamagedEntry("the header is that of another entry")
    return str(digest)


def check_data(data: Sequence[memoryview], digest: str) -> None:
    """Raises DamagedEntry if `data` does not have the hash `digest`."""
    if checksum(data) != digest:
        raise DamagedEntry("the data is damaged")


# ---------------------------------------------------------------------- tiers

FAILURES_IN_A_ROW = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """A circuit breaker: it opens after `FAILURES_IN_A_ROW`, and no calls are made while it is
    open. After a pause, one trial call is allowed, which closes the breaker or doubles the pause.
    Failures of calls that began before it opened do not count. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0
        self._until = 0.0
        self._on_trial = False

    @property
    def is_open(self) -> bool:
        return self._pause_s > 0

    @property
    def may_try(self) -> bool:
        """Whether `allows` would return True."""
        return not self._pause_s or self._clock() >= self._until

    def allows(self) -> bool:
        """Whether a call may be made now. While the breaker is open, True makes it the trial
        call."""
        with self._lock:
            if not self._pause_s:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause_s  # no other trial until this one is done
            self._on_trial = True
            return True

    def succeeded(self) -> bool:
        """Note a success; returns whether it has closed the breaker."""
        with self._lock:
            was_open = self._pause_s > 0
            self._failures = 0
            self._pause_s = 0.0
            self._on_trial = False
            return was_open

    def failed(self) -> bool:
        """Note a failure; returns whether it has opened the breaker, which was closed."""
        with self._lock:
            self._failures += 1
            was_open = self._pause_s > 0
            if self._failures < FAILURES_IN_A_ROW or (was_open and not self._on_trial):
                return False
            self._on_trial = False
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
            self._until = self._clock() + self._pause_s
            return not was_open


@dataclass
class Counts:
    """Counts of one tier since the start. `seconds`: operation -> counts by histogram bucket, then
    the sum in seconds. Thread-safe."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    errors: int = 0
    dropped: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, number: int = 1) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + number)

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the duration of the body to the histogram of `operation`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            with self._lock:
                row = self.seconds.setdefault(operation, [0.0] * (len(EMBEDDING_SECONDS) + 2))
                row[bisect_left(EMBEDDING_SECONDS, taken)] += 1
                row[-1] += taken

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            names = ("hits", "misses", "evictions", "errors", "dropped")
            seconds = {operation: list(row) for operation, row in self.seconds.items()}
            return {name: getattr(self, name) for name in names} | {"seconds": seconds}


class Tier(Protocol):
    """A store for entries that is larger or lives longer than host memory.

    Methods are called in separate threads and may block. They raise DamagedEntry, or any other
    exception, usually OSError, if the tier fails.
    """

    name: str
    counts: Counts
    breaker: Breaker

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        """Read the entry `key` into `into`; False if there is none. Deletes a damaged entry."""

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        """Store an entry atomically."""

    def delete(self, key: str) -> None:
        """Delete an entry, if it exists."""

    def clear(self) -> None:
        """Delete all entries of this model."""

    def size(self) -> dict[str, int | None]:
        """`entries`, `bytes` and `max_bytes`; None for values that the tier does not know."""

    def close(self) -> None: ...
