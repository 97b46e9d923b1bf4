"""TIFF and BigTIFF: size and orientation of the first page (TIFF 6.0, sections 2 and 8)."""

from server.imaging.header.base import Header, damaged
from server.imaging.header.directory import ORDERS, Directory, Span, read_directory
from server.imaging.header.exif import ORIENTATION, orientation_of

MAGIC = tuple(ORDERS)

_WIDTH, _HEIGHT, _XMP = 256, 257, 700


def read(data: bytes) -> Header:
    """Of the first page; `animated` if there is another one.

    Raises:
        InvalidImage: no directory, or no width or height in it.
    """
    wanted = (_WIDTH, _HEIGHT, ORIENTATION, _XMP)
    directory = read_directory(Span(data, 0, len(data)), wanted)
    if directory is None:
        raise damaged("TIFF", "it is truncated")
    width = directory.number(data, _WIDTH)
    height = directory.number(data, _HEIGHT)
    if not isinstance(width, int) or not isinstance(height, int):
        raise damaged("TIFF", "no width and height in its first directory")
    value = directory.values.get(_XMP)
    xmp = Span(data, value.start, value.end) if value else None
    turned = orientation_of(data, directory, xmp)
    return Header("TIFF", width, height, turned, _has_next(data, directory))


def _has_next(data: bytes, directory: Directory) -> bool:
    field = directory.layout.offset
    if directory.next is None or directory.next + field.size > len(data):
        return False
    (offset,) = field.unpack_from(data, directory.next)
    return offset not in (0, directory.offset)
