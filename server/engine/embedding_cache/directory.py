"""What an arena holds, written beside it, so that another process finds it there.

Each page of the arena has room for a record, which the first page of an entry uses. A record counts
from when its length is written, which is last; so a process that is killed at any moment leaves
only records of whole entries.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import astuple
from typing import NamedTuple, TypeAlias

import msgspec

from server.engine.embedding_cache.tier import Spec

# The place of an entry: (offset, length) in bytes of each piece, in order.
Extents: TypeAlias = tuple[tuple[int, int], ...]

PAGE_BYTES = 64 * 1024
_RECORD_BYTES = 512
_LENGTH = struct.Struct("<H")
_MOST_BYTES = _RECORD_BYTES - _LENGTH.size

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, tuple[str, int, int], Extents]).decode


class Record(NamedTuple):
    """An entry: its key, its tensor and its place."""

    key: str
    spec: Spec
    extents: Extents


def size_for(pages: int) -> int:
    """The bytes of the directory of an arena of so many pages."""
    return pages * _RECORD_BYTES


class Directory:
    """The records in `fd`, which is mapped as `memory`, from the byte `start` to its end."""

    def __init__(self, fd: int, memory: memoryview, start: int) -> None:
        self._fd = fd
        self._memory = memory
        self._start = start

    def note(self, record: Record) -> None:
        """Add a whole entry. One whose key or place is too long for a record is left out."""
        body = _encode((record.key, astuple(record.spec), record.extents))
        if len(body) > _MOST_BYTES:
            return
        at = self._place(record.extents)
        begin = at + _LENGTH.size
        self._memory[begin : begin + len(body)] = body
        _LENGTH.pack_into(self._memory, at, len(body))

    def drop(self, extents: Extents) -> None:
        """Remove the entry at `extents`, if it is here, before its room is used for another."""
        at = self._place(extents)
        if _LENGTH.unpack_from(self._memory, at)[0]:
            _LENGTH.pack_into(self._memory, at, 0)

    def records(self) -> Iterator[Record]:
        """All entries. Only memory that was written is read: to read other would allocate it."""
        for first, last in self._written():
            for at in range(first, last, _RECORD_BYTES):
                (length,) = _LENGTH.unpack_from(self._memory, at)
                if length:
                    begin = at + _LENGTH.size
                    key, spec, extents = _decode(self._memory[begin : begin + length])
                    yield Record(key, Spec(*spec), extents)

    def _place(self, extents: Extents) -> int:
        return self._start + extents[0][0] // PAGE_BYTES * _RECORD_BYTES

    def _written(self) -> Iterator[tuple[int, int]]:
        """The parts of the directory that have memory, from and to which byte."""
        end = len(self._memory)
        at = self._start
        while at < end:
            try:
                first = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:  # no more
                return
            at = min(end, os.lseek(self._fd, first, os.SEEK_HOLE))
            yield max(self._start, first), at
