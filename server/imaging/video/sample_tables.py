"""The sample tables of an MP4 file: sizes, places and times of all samples.

ISO/IEC 14496-12, 8.6 and 8.7. Times are in ticks of the track's time scale.
"""

import struct

import numpy as np
import numpy.typing as npt

from server.imaging.header.boxes import FULL, Box
from server.imaging.video.edit_list import Media
from server.imaging.video.track import MAX_FRAMES, Integers, Samples, check_count, damaged

_U32 = np.dtype(">u4")


def read(data: bytes, parts: dict[bytes, Box]) -> Media:
    """The samples in the boxes `parts` of an stbl box; none in most fragmented files.

    Raises:
        InvalidVideo, VideoTooLarge
    """
    sizes = _sizes(data, parts)
    count = len(sizes)
    if count == 0:
        return Media.empty()
    offsets = _offsets(data, parts, sizes)
    sizes, count = sizes[: len(offsets)], len(offsets)
    durations = _runs(_table(data, parts, b"stts", 2), count)
    decoded = np.cumsum(durations) - durations
    shown = decoded + _runs(_table(data, parts, b"ctts", 2).astype(np.int32), count, default=0)
    return Media(Samples(offsets, sizes, _keyframes(data, parts, count)), shown, durations)


def entries(data: bytes, start: int, end: int, columns: int, count: int) -> npt.NDArray[np.uint32]:
    """A table of big-endian numbers: uint32 (rows, columns), `count` rows or as many as fit.

    No table of a video has more rows than the video has frames."""
    rows = max(0, min(count, (end - start) // (4 * columns), MAX_FRAMES))
    table = np.frombuffer(data, _U32, rows * columns, start).reshape(rows, columns)
    return table.astype(np.uint32)


def _table(
    data: bytes, parts: dict[bytes, Box], kind: bytes, columns: int
) -> npt.NDArray[np.uint32]:
    """The entries of a box that begins with their count."""
    box = parts.get(kind)
    if box is None or box.end - box.start < FULL + 4:
        return np.empty((0, columns), np.uint32)
    (count,) = struct.unpack_from(">I", data, box.start + FULL)
    return entries(data, box.start + FULL + 4, box.end, columns, count)


def _sizes(data: bytes, parts: dict[bytes, Box]) -> Integers:
    """int64 (samples,)."""
    box = parts.get(b"stsz") or parts.get(b"stz2")
    if box is None:
        return np.empty(0, np.int64)
    common, count = struct.unpack_from(">II", data, box.start + FULL)
    check_count(count)
    start = box.start + FULL + 8
    if box.kind == b"stz2":
        return _small_sizes(data[start : box.end], common & 0xFF, count)
    if common:
        # Samples have at least the bytes that they are said to have.
        return np.full(min(count, len(data) // common), common, np.int64)
    return entries(data, start, box.end, 1, count)[:, 0].astype(np.int64)


def _small_sizes(table: bytes, bits: int, count: int) -> Integers:
    if bits == 16:
        return np.frombuffer(table, ">u2", min(count, len(table) // 2)).astype(np.int64)
    numbers = np.frombuffer(table, np.uint8)
    if bits == 4:
        numbers = np.stack([numbers >> 4, numbers & 15], axis=1).reshape(-1)
    elif bits != 8:
        raise damaged("its sample sizes have an unknown width")
    return numbers[:count].astype(np.int64)


def _offsets(data: bytes, parts: dict[bytes, Box], sizes: Integers) -> Integers:
    """Where each sample starts, in bytes: int64, as many samples as the chunks have."""
    if b"stco" in parts:
        chunks = _table(data, parts, b"stco", 1)[:, 0].astype(np.int64)
    else:
        halves = _table(data, parts, b"co64", 2).astype(np.int64)
        chunks = (np.minimum(halves[:, 0], 1 << 16) << 32) + halves[:, 1]
    runs = _table(data, parts, b"stsc", 3).astype(np.int64)
    if not len(chunks) or not len(runs):
        raise damaged("it does not say where its samples are")
    firsts = np.clip(runs[:, 0] - 1, 0, len(chunks))
    lengths = np.diff(firsts, append=len(chunks))
    if lengths.min() < 0:
        raise damaged("its chunks are not in order")
    in_chunk = np.repeat(runs[:, 1], lengths)
    chunks = chunks[firsts[0] :]
    # Cut what is beyond the number of samples before anything of that length is made.
    starts = np.cumsum(in_chunk) - in_chunk
    in_chunk = np.clip(len(sizes) - starts, 0, in_chunk)
    chunk_of = np.repeat(np.arange(len(chunks)), in_chunk)
    before = np.cumsum(sizes) - sizes
    first_of_chunk = np.minimum(starts, len(sizes) - 1)[chunk_of]
    offsets: Integers = chunks[chunk_of] + before[: len(chunk_of)] - before[first_of_chunk]
    return offsets


def _runs(
    table: npt.NDArray[np.uint32] | npt.NDArray[np.int32], count: int, default: int | None = None
) -> Integers:
    """The values of a table of (how often, value): int64 (count,). Missing ones are `default`, or
    the last value."""
    values = table[:, 1].astype(np.int64)
    lengths = table[:, 0].astype(np.int64) & 0xFFFFFFFF
    ends = np.minimum(np.cumsum(np.minimum(lengths, count)), count)
    filled = np.repeat(values, np.diff(ends, prepend=0))
    last = default if default is not None else int(values[-1]) if len(values) else 0
    return np.concatenate([filled, np.full(count - len(filled), last, np.int64)])


def _keyframes(data: bytes, parts: dict[bytes, Box], count: int) -> npt.NDArray[np.bool_]:
    if b"stss" not in parts:
        return np.ones(count, np.bool_)
    numbers = _table(data, parts, b"stss", 1)[:, 0].astype(np.int64) - 1
    marked = np.zeros(count, np.bool_)
    marked[numbers[(numbers >= 0) & (numbers < count)]] = True
    return marked
