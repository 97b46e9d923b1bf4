"""BMP: the size from the header of OS/2 1.x (12 bytes) or of Windows and OS/2 2.x."""

import struct

from server.imaging.header.base import Header, damaged

_HEADER = 14  # the file's header is before it
_OS2 = 12
# A height is negative where the rows go from top to bottom; Pillow believes it up to this one.
_MAX_TOP_DOWN = 1 << 24
_WINDOWS = frozenset((40, 52, 56, 64, 108, 124))


def read(data: bytes) -> Header:
    """
    Raises:
        InvalidImage: the header is cut short or has an unknown length.
    """
    (length,) = struct.unpack_from("<I", data, _HEADER)
    if len(data) < _HEADER + length:
        raise damaged("BMP", "it is truncated")
    if length == _OS2:
        width, height = struct.unpack_from("<HH", data, _HEADER + 4)
    elif length in _WINDOWS:
        width, height = struct.unpack_from("<ii", data, _HEADER + 4)
        if -_MAX_TOP_DOWN <= height < 0:
            height = -height
    else:
        raise damaged("BMP", f"a header of {length} bytes")
    return Header("BMP", width, height)
