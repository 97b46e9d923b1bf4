"""JPEG by TurboJPEG, which reports libjpeg's warnings about damage in the middle of a file.

The format has no checksum, so some damage cannot be detected: a flipped bit that keeps the codes in
step changes a few blocks, or the brightness of the blocks behind it.
"""

import functools
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from server.errors import InvalidImage
from server.imaging.codecs.base import (
    BY_DCT,
    BYTES_PER_PIXEL,
    Pixels,
    Stored,
    damaged,
    only_first,
    orientation,
    profile,
    reduced,
    truncated,
)

# Each scan of a progressive file covers the whole picture. Encoders write about ten scans; decoding
# this many pixels takes a minute.
_MAX_SCANS, _MAX_SCANNED_PIXELS = 500, 5_000_000_000
_START_OF_SCAN, _END_OF_IMAGE, _TABLES = b"\xff\xda", b"\xff\xd9", b"\xff\xc4"
_MAX_SEGMENTS = 10_000
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}

# Warnings that do not concern pixels, and TurboJPEG's about a subsampling unknown to it.
_HARMLESS = re.compile(
    "unknown JFIF revision|Unknown Adobe color transform|Invalid SOS parameters for sequential"
    "|bad ICC marker|determine subsampling"
)
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# Some webcams leave a few bytes before a restart marker. Damage rarely leaves so few.
_RESTARTS, _MAX_LEFT_BYTES = range(0xD0, 0xD8), 3
_END, _MAX_PADDING_BYTES = 0xD9, 64
# Markers before the first scan, where there are no pixels yet: quantization tables, frame header,
# restart interval, application data, comments.
_HEADERS = frozenset((0xC0, 0xC1, 0xC2, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))

# Faulty disks and interrupted transfers leave holes of zeros, which are usually valid codes. This
# many zeros are whole blocks whose coefficients are all -1, which no picture has, unless the
# shortest code is that of an empty block.
_HOLE = bytes(32)
_END_OF_BLOCK = 0


class JpegSource:
    """A JPEG file. Reduced pictures are decoded by `jpeg_reduced` if it supports the file."""

    reductions = BY_DCT

    def __init__(self, data: bytes, frame: int) -> None:
        only_first(frame)
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        if image.info.get("progressive"):
            _check_scans(data.count(_START_OF_SCAN), image.width * image.height)
        self._data = data
        self._image = image
        self.size = image.size
        self.orientation = orientation(image)
        self.profile = profile(image)
        self.bytes_per_pixel = BYTES_PER_PIXEL
        if image.info.get("progressive") and image.mode == "CMYK":
            # Two bytes for the coefficient of each sample, and four for the inks.
            self.bytes_per_pixel = 13

    def load(self, factor: int) -> Stored:
        space = _SPACES[self._image.mode]
        pixels = _decode_reduced(self._data, factor)
        if pixels is None:
            width, height = reduced(self.size, factor) if factor > 1 else (0, 0)
            try:
                pixels = _decode(self._data, space, width, height)
            except ValueError as error:
                self._check_warning(str(error))
                # TurboJPEG returns no picture with a warning, and reports only the first one.
                return self._by_pillow(factor)
        if _HOLE in self._data and self._has_hole():
            raise damaged()
        if space != "CMYK":
            return pixels
        # Adobe stores inks inverted, as do all other encoders.
        inks = np.invert(pixels, out=pixels)
        return Image.frombuffer("CMYK", inks.shape[1::-1], inks, "raw", "CMYK", 0, 1)

    def _check_warning(self, warning: str) -> None:
        """Accept libjpeg's first warning if it is harmless.

        Raises:
            InvalidImage: the warning concerns pixels.
        """
        if "Premature end" in warning:
            raise truncated()
        if match := _EXTRANEOUS.search(warning):
            count, marker = int(match[1]), int(match[2], 16)
            padded = count <= _MAX_PADDING_BYTES and bytes(count) + b"\xff\xd9" in self._data
            left = marker in _RESTARTS and count <= _MAX_LEFT_BYTES
            harmless = marker in _HEADERS or left or (marker == _END and padded)
        else:
            harmless = bool(_HARMLESS.search(warning))
        if not harmless:
            raise damaged()

    def _by_pillow(self, factor: int) -> Image.Image:
        width, height = self.size
        if factor > 1:
            self._image.draft(None, (width // factor, height // factor))
        self._image.load()
        return self._image

    def _has_hole(self) -> bool:
        """Whether the scan of a one-scan file has a run of zeros that no picture has."""
        image: Any = self._image
        if image.info.get("progressive"):
            return False  # zeros can encode many empty blocks there
        tables, scan = _read_tables(self._data)
        in_one_scan = self._data[scan : scan + 1] == bytes((image.layers,))
        if not in_one_scan or not tables or tables[0] == _END_OF_BLOCK:
            return False
        return self._data.find(_HOLE, scan, self._data.find(_END_OF_IMAGE, scan)) >= 0


def _check_scans(scans: int, pixels: int) -> None:
    most = min(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(pixels, 1))
    if scans > most:
        raise InvalidImage(f"the image has more than {most} scans")


@functools.cache
def warm_up() -> bool:
    """Compile or load the decoder for reduced pictures; False if it cannot be used.

    Called once before workers are forked, so that they share its memory.
    """
    from server.imaging.codecs import jpeg_reduced

    return jpeg_reduced.agrees_with_libjpeg()


def _decode_reduced(data: bytes, factor: int) -> Pixels | None:
    """As `_decode`; None if the faster decoder does not support this picture."""
    if factor not in (4, 8) or not warm_up():
        return None
    from server.imaging.codecs import jpeg_reduced

    pixels = jpeg_reduced.decode(data, factor)
    return pixels[:, :, None] if pixels is not None and pixels.ndim == 2 else pixels


def _decode(data: bytes, space: str, width: int, height: int) -> Pixels:
    """Decode to uint8 (height, width, channels), at the smallest scale that covers `width` x
    `height`.

    Raises:
        ValueError: libjpeg's first warning or error.
    """
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(
        data, space, min_width=width, min_height=height, strict=True
    )
    return pixels


def _read_tables(data: bytes) -> tuple[list[int], int]:
    """The symbol of the shortest code, which is all zeros, of each AC table, and the offset of the
    first scan's header behind its length field."""
    codes: list[int] = []
    at = 2
    for _ in range(_MAX_SEGMENTS):
        marker, end = data[at : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        at += 4
        if marker == _START_OF_SCAN:
            return codes, at
        while marker == _TABLES and at + 17 < end:
            if data[at] >> 4:
                codes.append(data[at + 17])
            at += 17 + sum(data[at + 1 : at + 17])
        at = end
    raise damaged()
