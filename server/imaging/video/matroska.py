"""Matroska and WebM files.

RFC 9559 (Matroska) and RFC 8794 (EBML). The first enabled video track is read. Elements are visited
one after another, and those that hold the frames are entered whatever their announced size, which
may be unknown.
"""

import struct
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from server.errors import UnsupportedVideoFormat
from server.imaging.sizing import Size
from server.imaging.video.track import (
    CODECS,
    MAX_TICKS,
    Codec,
    Rotation,
    Samples,
    Timeline,
    Track,
    check_count,
    damaged,
    quarter_turns,
)

# Elements that are visited in a file, of frames and others.
_MAX_STEPS = 1 << 19
# Elements of a track's description.
_MAX_ELEMENTS = 1024
_NANOSECONDS = 1e9

_SEGMENT, _CLUSTER, _GROUP = 0x18538067, 0x1F43B675, 0xA0
_INFO, _TRACKS = 0x1549A966, 0x1654AE6B
_SIMPLE_BLOCK, _BLOCK, _BLOCK_DURATION, _REFERENCE = 0xA3, 0xA1, 0x9B, 0xFB
_TIMESTAMP = 0xE7
_KEYFRAME, _LACING = 0x80, 0x06

_CODECS: dict[bytes, Codec] = {
    b"V_MPEG4/ISO/AVC": "h264",
    b"V_MPEGH/ISO/HEVC": "hevc",
    b"V_VP8": "vp8",
    b"V_VP9": "vp9",
    b"V_AV1": "av1",
    b"V_MPEG4/ISO/SP": "mpeg4",
    b"V_MPEG4/ISO/ASP": "mpeg4",
    b"V_MPEG4/ISO/AP": "mpeg4",
}


@dataclass
class _Description:
    """What a TrackEntry says."""

    number: int
    codec: Codec
    size: Size
    rotation: Rotation
    configuration: bytes
    prefix: bytes
    frame_ns: int


@dataclass
class _Blocks:
    """The blocks of a track, as lists of equal length. Times are in ticks of the file; `step` is
    the time from one frame in a block to the next; `visited` counts elements and frames."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keyframes: list[bool] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    last_duration: int = 0
    step: float = 0.0
    visited: int = 0


def read(data: bytes) -> Track:
    """The first enabled video track of a Matroska or WebM file.

    Raises:
        InvalidVideo: the file is damaged or has no frames.
        UnsupportedVideoFormat: its codec is not supported.
        VideoTooLarge: it has more than `track.MAX_FRAMES` frames.
    """
    try:
        scale, entry, blocks = _read(data)
    except (IndexError, struct.error):
        raise damaged("its elements are not those of a video") from None
    if not blocks.offsets:
        raise damaged("it has no frames")
    samples = Samples(
        np.array(blocks.offsets, np.int64),
        np.array(blocks.sizes, np.int64),
        np.array(blocks.keyframes, np.bool_),
    )
    if not samples.keyframes[0]:
        samples.keyframes[0] = True
    return Track(
        container="matroska",
        codec=entry.codec,
        coded_size=entry.size,
        rotation=entry.rotation,
        samples=samples,
        timeline=_timeline(data, samples, blocks, entry, scale),
        configuration=entry.configuration,
        prefix=entry.prefix,
    )


def _timeline(
    data: bytes, samples: Samples, blocks: _Blocks, entry: _Description, scale: int
) -> Timeline:
    ticks = np.array(blocks.times, np.float64)
    shown = np.flatnonzero(_is_shown(data, samples, entry))
    if not len(shown):
        raise damaged("none of its frames is shown")
    order = shown[np.argsort(ticks[shown], kind="stable")]
    seconds = (ticks[order] - ticks[order[0]]) * (scale / _NANOSECONDS)
    even = np.arange(len(order)) * (entry.frame_ns / _NANOSECONDS)
    if entry.frame_ns and np.abs(seconds - even).max() <= scale / _NANOSECONDS:
        seconds = even  # a constant rate, whose times the file rounds
    span = float(seconds[-1])
    if blocks.last_duration:
        last = blocks.last_duration * scale / _NANOSECONDS
    elif entry.frame_ns:
        last = entry.frame_ns / _NANOSECONDS
    else:
        last = span / (len(order) - 1) if len(order) > 1 else 0.0
    return Timeline(order, seconds, span + last)


def _is_shown(data: bytes, samples: Samples, entry: _Description) -> npt.NDArray[np.bool_]:
    """Which samples have a frame that is shown: VP8 and VP9 have some for reference only."""
    content = np.frombuffer(data, np.uint8)
    first = content[samples.offsets]
    if entry.prefix:
        first = np.full(len(samples), entry.prefix[0])
    shown = np.ones(len(samples), np.bool_)
    if entry.codec == "vp8":
        shown = first & 0x10 != 0
    if entry.codec == "vp9":
        last = content[samples.offsets + samples.sizes - 1]
        is_several = last & 0xE0 == 0xC0
        is_profile_3 = first & 0x30 == 0x30
        existing = np.where(is_profile_3, first & 0x04, first & 0x08) != 0
        own = np.where(is_profile_3, first & 0x01, first & 0x02) != 0
        shown = is_several | existing | own
    return shown


# ---------------------------------------------------------------------- elements


def _element(data: bytes, at: int) -> tuple[int, int, int | None]:
    """The id of the element at `at`, where its contents start, and their length; None: unknown.

    Raises:
        IndexError: it is no element, or the file ends in it.
    """
    first = data[at]
    width = 9 - first.bit_length()
    if width > 4:
        raise IndexError
    kind = int.from_bytes(data[at : at + width])
    at += width
    first = data[at]
    width = 9 - first.bit_length()
    if width > 8:
        raise IndexError
    length = int.from_bytes(data[at : at + width]) & (1 << 7 * width) - 1
    return kind, at + width, None if length == (1 << 7 * width) - 1 else length


def _children(data: bytes, start: int, end: int) -> list[tuple[int, int, int]]:
    """The elements from `start` to `end`: (id, start of the contents, their end)."""
    found: list[tuple[int, int, int]] = []
    while start < end and len(found) < _MAX_ELEMENTS:
        kind, start, length = _element(data, start)
        stop = end if length is None else start + length
        if stop > end:
            raise IndexError
        found.append((kind, start, stop))
        start = stop
    return found


def _number(data: bytes, start: int, end: int) -> int:
    return int.from_bytes(data[start : min(end, start + 8)])


def _read(data: bytes) -> tuple[int, _Description, _Blocks]:
    """The nanoseconds of a tick, the track, and its blocks."""
    scale, entry, blocks = 1_000_000, None, _Blocks()
    at, base, size = 0, 0, len(data)
    while at < size and blocks.visited < _MAX_STEPS:
        blocks.visited += 1
        try:
            kind, start, length = _element(data, at)
        except IndexError:
            break  # the file is cut, or damaged from here on
        if kind in (_SEGMENT, _CLUSTER):
            at = start
            continue
        if length is None:
            break  # nothing else may have an unknown length
        at = end = start + length
        if end > size:
            break
        if kind == _SIMPLE_BLOCK and entry is not None:
            _add(data, start, end, base, entry, blocks, None)
        elif kind == _GROUP and entry is not None:
            _add_group(data, start, end, base, entry, blocks)
        elif kind == _TIMESTAMP:
            base = min(_number(data, start, end), MAX_TICKS)
        elif kind == _INFO:
            for name, first, last in _children(data, start, end):
                blocks.visited += 1
                if name == 0x2AD7B1:
                    scale = max(1, _number(data, first, last))
        elif kind == _TRACKS and entry is None:
            blocks.visited += _MAX_STEPS // 16
            entry = _track(data, start, end)
            blocks.step = entry.frame_ns / scale if entry is not None else 0.0
    if entry is None:
        raise damaged("it has no video track")
    return scale, entry, blocks


# ---------------------------------------------------------------------- blocks


def _add_group(
    data: bytes, start: int, end: int, base: int, entry: _Description, blocks: _Blocks
) -> None:
    parts = _children(data, start, end)
    blocks.visited += len(parts)
    kinds = [kind for kind, _, _ in parts]
    for kind, first, last in parts:
        if kind == _BLOCK and _add(data, first, last, base, entry, blocks, _REFERENCE not in kinds):
            durations = [_number(data, a, b) for kind, a, b in parts if kind == _BLOCK_DURATION]
            blocks.last_duration = min(durations[0], MAX_TICKS) if durations else 0


def _add(
    data: bytes,
    start: int,
    end: int,
    base: int,
    entry: _Description,
    blocks: _Blocks,
    is_keyframe: bool | None,
) -> bool:
    """Add the frames of a block if it is of the track `entry`. A SimpleBlock says itself whether it
    is a keyframe: `is_keyframe` is None."""
    width = 9 - data[start].bit_length()
    number = int.from_bytes(data[start : start + width]) & (1 << 7 * width) - 1
    if number != entry.number:
        return False
    at = start + width
    (relative,) = struct.unpack_from(">h", data, at)
    flags = data[at + 2]
    at += 3
    if is_keyframe is None:
        is_keyframe, blocks.last_duration = bool(flags & _KEYFRAME), 0
    spans = [(at, end - at)] if not flags & _LACING else _laced(data, at, end, flags & _LACING)
    blocks.visited += len(spans)
    for index, (offset, size) in enumerate(spans):
        if offset + size > end:
            raise IndexError
        if size <= 0:
            continue
        check_count(len(blocks.offsets) + 1)
        blocks.offsets.append(offset)
        blocks.sizes.append(size)
        blocks.keyframes.append(is_keyframe)
        blocks.times.append(base + relative + index * blocks.step)
    return True


def _laced(data: bytes, at: int, end: int, lacing: int) -> list[tuple[int, int]]:
    """The frames of a block that has several: (offset, size)."""
    count = data[at] + 1
    at += 1
    if lacing == 0x04:
        size = (end - at) // count
        return [(at + index * size, size) for index in range(count)]
    sizes: list[int] = []
    for index in range(count - 1):
        if lacing == 0x02:  # Xiph
            size = 0
            while True:
                byte = data[at]
                at += 1
                size += byte
                if byte < 255:
                    break
        else:  # EBML: the first size, then differences
            width = 9 - data[at].bit_length()
            value = int.from_bytes(data[at : at + width]) & (1 << 7 * width) - 1
            size = value if not index else sizes[-1] + value - ((1 << 7 * width - 1) - 1)
            at += width
        sizes.append(size)
    sizes.append(end - at - sum(sizes))
    if min(sizes) < 0:
        raise IndexError
    return list(zip(accumulate(sizes, initial=at), sizes, strict=False))


# ---------------------------------------------------------------------- the track


def _track(data: bytes, start: int, end: int) -> _Description | None:
    """The first enabled video track in a Tracks element."""
    videos = []
    for kind, first, last in _children(data, start, end):
        if kind == 0xAE:
            parts = {name: (a, b) for name, a, b in reversed(_children(data, first, last))}
            if 0x83 in parts and _number(data, *parts[0x83]) == 1:
                videos.append(parts)
    if not videos:
        return None
    enabled = [parts for parts in videos if 0xB9 not in parts or _number(data, *parts[0xB9])]
    return _description(data, (enabled or videos)[0])


def _description(data: bytes, parts: dict[int, tuple[int, int]]) -> _Description:
    start, end = parts.get(0x86, (0, 0))
    name = data[start:end].rstrip(b"\0")
    codec = _CODECS.get(name)
    if codec is None:
        raise UnsupportedVideoFormat(f"the codec of the video is not supported ({CODECS})")
    if 0xD7 not in parts or 0xE0 not in parts:
        raise damaged("its video track is not described")
    video = {kind: (a, b) for kind, a, b in reversed(_children(data, *parts[0xE0]))}
    width, height = (_number(data, *video.get(kind, (0, 0))) for kind in (0xB0, 0xBA))
    if not width or not height:
        raise damaged("its frames have no size")
    first, last = parts.get(0x63A2, (0, 0))
    return _Description(
        number=_number(data, *parts[0xD7]),
        codec=codec,
        size=(width, height),
        rotation=_roll(data, video),
        configuration=data[first:last],
        prefix=_prefix(data, parts),
        frame_ns=_number(data, *parts.get(0x23E383, (0, 0))),
    )


def _roll(data: bytes, video: dict[int, tuple[int, int]]) -> Rotation:
    """The rotation of a rectangular projection, which is counter-clockwise in the file."""
    if 0x7670 not in video:
        return 0
    parts = {kind: (a, b) for kind, a, b in _children(data, *video[0x7670])}
    if 0x7675 not in parts or (0x7671 in parts and _number(data, *parts[0x7671])):
        return 0
    start, end = parts[0x7675]
    (roll,) = struct.unpack_from(">d" if end - start == 8 else ">f", data, start)
    return quarter_turns(-roll) if abs(roll) <= 360 else 0


def _prefix(data: bytes, parts: dict[int, tuple[int, int]]) -> bytes:
    """The bytes that were removed from the start of each frame.

    Raises:
        UnsupportedVideoFormat: frames are compressed or encrypted otherwise.
    """
    if 0x6D80 not in parts:
        return b""
    (_, start, end), *more = _children(data, *parts[0x6D80]) or [(0, 0, 0)]
    encoding = {kind: (a, b) for kind, a, b in _children(data, start, end)}
    unsupported = UnsupportedVideoFormat("the frames of the video are compressed or encrypted")
    if more or 0x5034 not in encoding:
        raise unsupported
    settings = {kind: (a, b) for kind, a, b in _children(data, *encoding[0x5034])}
    if 0x4254 not in settings or _number(data, *settings[0x4254]) != 3:
        raise unsupported
    first, last = settings.get(0x4255, (0, 0))
    return data[first:last]
