"""The frames of a GIF file, found without decoding them (GIF89a specification)."""

from collections.abc import Iterator

from server.errors import InvalidImage
from server.imaging.codecs.base import damaged, truncated
from server.imaging.sizing import Size

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_SCREEN_BYTES = 13
# Blocks have up to 255 bytes, and encoders fill them.
_MAX_BLOCKS = 2_000_000


def has_end(data: bytes) -> bool:
    """Whether the file has come to its end. Some writers pad it, or leave other things behind."""
    if data.rstrip(b"\0\r\n ")[-1:] == bytes((_END,)):
        return True
    try:
        for _ in frames(data):
            pass
    except InvalidImage:
        return False
    return True


def frames(data: bytes) -> Iterator[Size]:
    """How far from the upper left corner each frame reaches: (width, height) in pixels.

    Raises:
        InvalidImage: the file ends within a frame, or has blocks that are none.
    """
    try:
        yield from _frames(data)
    except IndexError:
        raise truncated() from None


def _frames(data: bytes) -> Iterator[Size]:
    at = _SCREEN_BYTES + _table_bytes(data[10])
    left = _MAX_BLOCKS
    while left:
        kind = data[at]
        if kind == _END:
            return
        if kind == _EXTENSION:
            at, left = _skip(data, at + 2, left)
        elif kind == _IMAGE:
            x, y, width, height = (
                int.from_bytes(data[at + i : at + i + 2], "little") for i in (1, 3, 5, 7)
            )
            at, left = _skip(data, at + 11 + _table_bytes(data[at + 9]), left)
            yield x + width, y + height
        else:
            raise damaged()
    raise damaged()


def _table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip(data: bytes, at: int, left: int) -> tuple[int, int]:
    """Behind the blocks of data that begin at `at`, and how many more may be read."""
    while data[at] and left:
        at += data[at] + 1
        left -= 1
    return at + 1, max(left - 1, 0)
