"""Animated GIF and WebP pictures as videos: how long each frame is shown.

Readers follow lengths only, for at most `_MAX_STEPS` steps.
"""

import struct
from collections.abc import Iterator

import numpy as np

from server.errors import VideoTooLarge
from server.imaging import header as headers
from server.imaging.video.header import VideoHeader
from server.imaging.video.track import damaged

# Of blocks, chunks and frames; each takes less than a microsecond.
_MAX_STEPS = 1 << 21
# What decoders decode of an animation.
_MAX_FRAMES = 1000
_DESCRIPTOR, _CHUNK = struct.Struct("<HHHHB"), struct.Struct("<4sI")
_EXTENSION, _IMAGE, _TRAILER = b"!,;"
_GRAPHIC_CONTROL = 0xF9
# Browsers show frames with shorter times for a tenth of a second.
_SHORTEST_S, _DEFAULT_S = 0.011, 0.1


def read(data: bytes) -> VideoHeader:
    """The header of an animation.

    Raises:
        InvalidVideo: the file is damaged.
        VideoTooLarge: it has too many frames or blocks.
        ClientError: as `imaging.header.read` does.
    """
    size = headers.read(data).size
    try:
        found = list(_gif(data) if data.startswith(b"GIF8") else _webp(data))
    except (IndexError, struct.error):
        raise damaged("it is truncated") from None
    if not found:
        raise damaged("it has no frames")
    lengths = np.array(found)
    lengths[lengths < _SHORTEST_S] = _DEFAULT_S
    ends = lengths.cumsum().round(6)
    times = np.concatenate(([0.0], ends[:-1]))
    return VideoHeader("animation", None, size, 0, times, float(ends[-1]))


class _Steps:
    """Counts steps and frames."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS
        self._frames = 0

    def one(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise VideoTooLarge("the animation has too many blocks")

    def frame(self) -> None:
        self._frames += 1
        if self._frames > _MAX_FRAMES:
            raise VideoTooLarge(f"the animation has more than {_MAX_FRAMES} frames")


def _gif(data: bytes) -> Iterator[float]:
    """Seconds of each frame. A file that ends early has the frames before."""
    steps, delay = _Steps(), 0.0
    at = 13 + _palette_bytes(data[10])
    while at < len(data) and data[at] != _TRAILER:
        steps.one()
        kind = data[at]
        at += 1
        if kind == _IMAGE:
            flags = _DESCRIPTOR.unpack_from(data, at)[4]
            steps.frame()
            yield delay
            delay = 0.0
            at = _behind_blocks(data, at + _DESCRIPTOR.size + _palette_bytes(flags) + 1, steps)
        elif kind == _EXTENSION:
            if data[at] == _GRAPHIC_CONTROL and data[at + 1] >= 4:
                delay = int.from_bytes(data[at + 3 : at + 5], "little") / 100
            at = _behind_blocks(data, at + 1, steps)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int, steps: _Steps) -> int:
    while at < len(data) and data[at]:
        steps.one()
        at += data[at] + 1
    return at + 1


def _webp(data: bytes) -> Iterator[float]:
    steps, at = _Steps(), 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + _CHUNK.size <= end:
        steps.one()
        kind, length = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if kind == b"ANMF":
            steps.frame()
            yield int.from_bytes(data[at + 12 : at + 15], "little") / 1000
        at += length + (length & 1)
