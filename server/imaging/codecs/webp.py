"""WebP: still pictures by OpenCV or libvips, frames of animations by Pillow."""

import itertools
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from server.imaging.codecs.base import (
    BY_MEANS,
    BYTES_PER_PIXEL,
    MAX_FRAMES,
    NO_REDUCTIONS,
    Pixels,
    Stored,
    damaged,
    load_large,
    no_frame,
    only_first,
    opencv,
    orientation,
    profile,
    truncated,
)
from server.imaging.codecs.pillow import FRAMES_BYTES_PER_PIXEL, PillowSource
from server.imaging.sizing import Size

_CHUNK = struct.Struct("<4sI")
_FIRST = 12  # behind "RIFF", the length and "WEBP"
_ANIMATED, _ALPHA = 0x02, 0x10
_INFO = {b"ICCP": "icc_profile", b"EXIF": "exif", b"XMP ": "xmp"}
# A still picture has up to seven chunks, and an animation one per frame.
_MAX_CHUNKS = 100_000
# About 64 MB in RGBA. Larger pictures are shrunk while they are read, which is slower but takes
# less memory.
_MAX_WHOLE_PIXELS = 16_000_000


class WebpSource:
    """A still picture."""

    def __init__(self, data: bytes) -> None:
        holder = Image.Image()
        for kind, start, end in _walk(data):
            if kind in _INFO:
                holder.info.setdefault(_INFO[kind], data[start:end])
        self._data = data
        self.size = _size(data)
        self.orientation = orientation(holder)
        self.profile = profile(holder)
        is_large = self.size[0] * self.size[1] > _MAX_WHOLE_PIXELS
        self.reductions = BY_MEANS if is_large else NO_REDUCTIONS
        self.bytes_per_pixel = BYTES_PER_PIXEL

    def load(self, factor: int) -> Pixels:
        if factor > 1:
            return load_large("webpload", self._data, self.size, factor)
        return _decode(self._data, self.size)


class WebpAnimation:
    """A frame of an animation, by Pillow. The first `load` opens the file, since Pillow allocates
    two canvases for it."""

    reductions = NO_REDUCTIONS
    bytes_per_pixel = FRAMES_BYTES_PER_PIXEL
    keeps = False
    """Whether `load` will be called again for another frame."""

    def __init__(self, data: bytes, frame: int) -> None:
        still = WebpSource(data)
        self._count = count_frames(data)
        if not self._count:
            raise damaged()
        self._data = data
        self._opened: PillowSource | None = None
        self.move_to(frame)
        self.size = still.size
        self.orientation = still.orientation
        self.profile = still.profile

    def move_to(self, frame: int) -> None:
        """Select another frame. Raises ImageFrameMissing."""
        if frame >= self._count:
            raise no_frame(frame)
        self._frame = frame

    def load(self, factor: int) -> Stored:
        opened = self._opened or PillowSource(self._data, self._frame, "WEBP")
        opened.move_to(self._frame)
        if self.keeps:
            self._opened = opened
            opened.keeps = True
        return opened.load(factor)


def _decode(data: bytes, size: Size) -> Pixels:
    cv2 = opencv()
    flag = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        # There is no flag for RGBA.
        how = cv2.IMREAD_UNCHANGED if _may_have_alpha(data) else flag
        pixels: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error as error:
        raise damaged() from error
    if pixels is None or pixels.shape[1::-1] != size:
        raise damaged()
    if how == flag:
        return pixels
    order = cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB
    exchanged: Pixels = cv2.cvtColor(pixels, order, dst=pixels)
    return exchanged


def _may_have_alpha(data: bytes) -> bool:
    if data[12:16] == b"VP8X":
        return bool(data[20] & _ALPHA)
    return data[12:16] == b"VP8L"


def open_webp(data: bytes, frame: int) -> WebpSource | WebpAnimation:
    if is_animated(data):
        return WebpAnimation(data, frame)
    only_first(frame)
    return WebpSource(data)


def is_animated(data: bytes) -> bool:
    return data[12:16] == b"VP8X" and bool(data[20] & _ANIMATED)


def count_frames(data: bytes) -> int:
    """The number of frames of an animation, up to `MAX_FRAMES`."""
    frames = (True for kind, _, _ in _walk(data) if kind == b"ANMF")
    return sum(itertools.islice(frames, MAX_FRAMES))


def _walk(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the chunks."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise truncated()
    at = _FIRST
    for _ in range(_MAX_CHUNKS):
        if at + _CHUNK.size > end:
            return
        kind, length = _CHUNK.unpack_from(data, at)
        start = at + _CHUNK.size
        if start + length > end:
            raise truncated()
        yield kind, start, start + length
        at = start + length + (length & 1)
    raise damaged()


def _size(data: bytes) -> Size:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise damaged()
