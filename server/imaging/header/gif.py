"""GIF: size of the screen, or of the first frame if that is larger (GIF89a, 18 to 26)."""

import struct

from server.errors import InvalidImage
from server.imaging.header.base import MAX_STEPS, ImageHeader, damaged

_SCREEN = struct.Struct("<HHB")
_FRAME = struct.Struct("<HHHHB")
_EXTENSION, _IMAGE, _TRAILER = b"!,;"
_COMMENT = 0xFE

# Blocks of 255 bytes, the largest possible, are skipped in groups of this many.
_STRIDE = 256
_FULL = b"\xff" * _STRIDE


def read(data: bytes) -> ImageHeader:
    """At most `MAX_STEPS` blocks are read before, in and behind the first frame each; 256 full
    blocks in a row count as one.

    Raises:
        InvalidImage: there is no frame.
    """
    width, height, flags = _SCREEN.unpack_from(data, 6)
    at = _next_frame(data, 13 + _palette_bytes(flags))
    if at is None:
        raise damaged("GIF", "it has no frame")
    left, top, frame_width, frame_height, flags = _FRAME.unpack_from(data, at)
    at += _FRAME.size + _palette_bytes(flags) + 1  # one byte has the code size
    return ImageHeader(
        "GIF",
        max(width, left + frame_width),
        max(height, top + frame_height),
        animated=_goes_on(data, at),
    )


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _next_frame(data: bytes, at: int) -> int | None:
    """The offset of the next frame's descriptor; None if there are no more frames.

    Raises:
        IndexError: the data ends within an extension.
        InvalidImage: there are too many blocks before the frame.
    """
    left = MAX_STEPS
    while left > 0:
        left -= 1
        if at >= len(data) or data[at] == _TRAILER:
            return None
        kind = data[at]
        at += 1
        if kind == _IMAGE:
            return at
        if kind == _EXTENSION:
            # Pillow assumes a first block, even an empty one, except in a comment.
            at += 1 if data[at] == _COMMENT else data[at + 1] + 2
            at, left = _skip_blocks(data, at, left)
    raise damaged("GIF", "too many blocks before a frame")


def _skip_blocks(data: bytes, at: int, left: int) -> tuple[int, int]:
    """The offset behind a chain of blocks, and how many of the `left` steps then remain."""
    while left > 0 and at < len(data):
        left -= 1
        if data[at : at + 256 * _STRIDE : 256] == _FULL:
            at += 256 * _STRIDE
            continue
        length = data[at]
        at += length + 1
        if not length:
            break
    return at, left


def _goes_on(data: bytes, at: int) -> bool:
    """Whether there may be a frame behind the image data that begins at `at`."""
    at, left = _skip_blocks(data, at, MAX_STEPS)
    try:
        return left == 0 or _next_frame(data, at) is not None
    except IndexError:
        return False
    except InvalidImage:
        return True
