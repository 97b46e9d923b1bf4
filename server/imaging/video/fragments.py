"""The fragments of an MP4 file: samples that are described beside them, not in the moov box.

ISO/IEC 14496-12, 8.8. Times are in ticks of the track's time scale.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from server.errors import VideoTooLarge
from server.imaging.header.boxes import FULL, Box, Fields, boxes, unsigned
from server.imaging.video.edit_list import Media
from server.imaging.video.sample_tables import entries
from server.imaging.video.track import MAX_TICKS, Samples, check_count, damaged

# Flags of a tfhd box.
_BASE_OFFSET, _DESCRIPTION, _DURATION, _SIZE, _FLAGS = 0x1, 0x2, 0x8, 0x10, 0x20
# Flags of a trun box.
_DATA_OFFSET, _FIRST_FLAGS = 0x1, 0x4
_COLUMNS = (0x100, 0x200, 0x400, 0x800)  # duration, size, flags, composition offset
_IS_NOT_KEYFRAME = 0x10000
# Parts of fragments that are read.
_MAX_PARTS = 1 << 16


@dataclass
class _Defaults:
    """What samples have that do not say otherwise."""

    duration: int = 0
    size: int = 0
    flags: int = 0


@dataclass
class _Place:
    """Where the next sample is, in bytes of the file and in ticks."""

    offset: int
    ticks: int


def read(data: bytes, moofs: Sequence[Box], number: int, extends: Box) -> list[Media]:
    """The samples of track `number` in `moofs`; `extends` is the file's mvex box.

    Raises:
        InvalidVideo, VideoTooLarge, InvalidImage, IndexError, struct.error
    """
    found: list[Media] = []
    defaults = _defaults(data, number, extends)
    parts = count = ticks = 0
    for moof, traf in _fragments(data, moofs):
        inside = list(islice(boxes(data, traf), _MAX_PARTS - parts))
        parts += 1 + len(inside)
        if parts >= _MAX_PARTS:
            raise VideoTooLarge("the video has too many fragments")
        kinds = {box.kind: box for box in reversed(inside)}
        head = kinds.get(b"tfhd")
        if head is None or unsigned(data, head.start + FULL, 4) != number:
            continue
        own, offset = _head(data, head, moof, defaults)
        place = _Place(offset, _decode_time(data, kinds.get(b"tfdt"), ticks))
        for run in (box for box in inside if box.kind == b"trun"):
            media = _run(data, run, place, own, offset)
            check_count(count := count + len(media.samples))
            found.append(media)
        ticks = place.ticks
    return found


def _fragments(data: bytes, moofs: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """The parts of each fragment that are of one track, and the fragment."""
    for moof in moofs:
        yield from ((moof, box) for box in boxes(data, moof) if box.kind == b"traf")


def _defaults(data: bytes, number: int, extends: Box) -> _Defaults:
    for box in boxes(data, extends):
        if box.kind == b"trex":
            track, _, *rest = struct.unpack_from(">IIIII", data, box.start + FULL)
            if track == number:
                return _Defaults(*rest)
    return _Defaults()


def _head(data: bytes, box: Box, moof: Box, defaults: _Defaults) -> tuple[_Defaults, int]:
    """What a tfhd box says: its defaults, and the offset that its runs count from."""
    flags = int.from_bytes(data[box.start + 1 : box.start + FULL])
    fields = Fields(data, box.start + FULL + 4)
    offset = fields.take(8) if flags & _BASE_OFFSET else moof.start - 8
    fields.at += 4 if flags & _DESCRIPTION else 0
    return _Defaults(
        fields.take(4) if flags & _DURATION else defaults.duration,
        fields.take(4) if flags & _SIZE else defaults.size,
        fields.take(4) if flags & _FLAGS else defaults.flags,
    ), min(offset, MAX_TICKS)


def _decode_time(data: bytes, box: Box | None, ticks: int) -> int:
    if box is None:
        return ticks
    ticks = Fields(data, box.start + FULL).take(8 if data[box.start] == 1 else 4)
    if ticks > MAX_TICKS:
        raise damaged("its times are too large")
    return ticks


def _run(data: bytes, box: Box, place: _Place, defaults: _Defaults, base: int) -> Media:
    """The samples of a trun box; `place` moves behind them."""
    flags = int.from_bytes(data[box.start + 1 : box.start + FULL])
    fields = Fields(data, box.start + FULL)
    count = fields.take(4)
    if flags & _DATA_OFFSET:
        (relative,) = struct.unpack_from(">i", data, fields.at)
        place.offset = base + relative
        fields.at += 4
    first_flags = fields.take(4) if flags & _FIRST_FLAGS else None
    check_count(count)
    present = [flag for flag in _COLUMNS if flags & flag]
    if present:
        table = entries(data, fields.at, box.end, len(present), count)
        count = len(table)
    columns = {flag: table[:, index] for index, flag in enumerate(present)}
    durations, sizes, marks, later = (
        columns.get(flag, np.full(count, default, np.uint32))
        for flag, default in zip(
            _COLUMNS, (defaults.duration, defaults.size, defaults.flags, 0), strict=True
        )
    )
    keyframes = marks & _IS_NOT_KEYFRAME == 0
    if first_flags is not None and count:
        keyframes[0] = not first_flags & _IS_NOT_KEYFRAME
    lengths, bytes_each = durations.astype(np.int64), sizes.astype(np.int64)
    ends, byte_ends = np.cumsum(lengths), np.cumsum(bytes_each)
    shown = place.ticks + ends - lengths + later.astype(np.int32)
    offsets = place.offset + byte_ends - bytes_each
    if count:
        place.ticks += int(ends[-1])
        place.offset += int(byte_ends[-1])
    return Media(Samples(offsets, bytes_each, keyframes), shown, lengths)
