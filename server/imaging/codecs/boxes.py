"""The outermost boxes of a HEIF or AVIF file, to tell where it was cut off."""

from server.imaging.codecs.base import damaged, truncated

# A file has about four.
_MAX_BOXES = 1000


def check_boxes(data: bytes) -> None:
    """
    Raises:
        InvalidImage: a box ends behind the end of the data, or none can.
    """
    at = 0
    for _ in range(_MAX_BOXES):
        if at == len(data):
            return
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # it ends with the file
            return
        if at + 8 > len(data) or at + size > len(data):
            raise truncated()
        if size < 8:
            raise damaged()
        at += size
    raise damaged()
