"""Orientation from EXIF and XMP, as Pillow finds it.

Where EXIF has no orientation, that of XMP counts. Where EXIF cannot be read at all, or has the form
of BigTIFF, Pillow leaves the picture as it is stored.
"""

import re

from server.imaging.header.base import MAX_TEXT_BYTES
from server.imaging.header.directory import Directory, Span, read_directory

ORIENTATION = 274
_TURNS = frozenset(range(1, 9))

_PREFIX = b"Exif\0\0"
_XMP_NAME = b"tiff:Orientation"
_XMP_ORIENTATION = re.compile(_XMP_NAME + b'(?:="|>)([0-9])')


def orientation(exif: Span | None, xmp: Span | None) -> int:
    """EXIF's orientation, or else XMP's; 1 if there is none, or EXIF cannot be read."""
    directory = None
    if exif is not None:
        exif = _without_prefix(exif)
        if exif.start < exif.end:
            directory = read_directory(exif, (ORIENTATION,))
            if directory is None or directory.layout.big:
                return 1
    return orientation_of(exif.data if exif else b"", directory, xmp)


def has_orientation(exif: Span) -> bool:
    directory = read_directory(_without_prefix(exif), (ORIENTATION,))
    return directory is not None and ORIENTATION in directory.values


def orientation_of(data: bytes, directory: Directory | None, xmp: Span | None) -> int:
    """The orientation, 1 to 8, of a directory of `data`, or else that of XMP; 1 if it is none."""
    found: int | float | None = None
    if directory is not None and ORIENTATION in directory.values:
        found = directory.number(data, ORIENTATION)
    elif xmp is not None:
        found = _in_xmp(xmp)
    return int(found) if found in _TURNS else 1


def _without_prefix(exif: Span) -> Span:
    data, start, end = exif
    for _ in range(2):
        if data.startswith(_PREFIX, start, end):
            start += len(_PREFIX)
    return Span(data, start, end)


def _in_xmp(xmp: Span) -> int | None:
    """The first orientation that is written as RDF writes it, within `MAX_TEXT_BYTES`."""
    data, start, end = xmp
    end = min(end, start + MAX_TEXT_BYTES)
    # Far faster than the expression is where there is none.
    start = data.find(_XMP_NAME, start, end)
    match = _XMP_ORIENTATION.search(data, start, end) if start >= 0 else None
    return int(match[1]) if match else None
