"""The primary item of a HEIF file and its properties (ISO/IEC 23008-12, 6.2 and 9.3).

No list is followed for more than `MAX_STEPS` entries.
"""

from server.imaging.header.base import MAX_STEPS, damaged
from server.imaging.header.boxes import FULL, Box, Fields, boxes, child, id_bytes, missing, unsigned

# There is one list for all items, or one for each width of their numbers.
_MAX_LISTS = 4


def primary_item(data: bytes, parts: dict[bytes, Box]) -> int:
    """The number of the item that is the picture; `parts` are the boxes in `meta`.

    Raises:
        InvalidImage: none is named.
    """
    box = parts.get(b"pitm")
    if box is None:
        raise missing(b"pitm")
    return unsigned(data, box.start + FULL, id_bytes(data, box))


def primary_properties(data: bytes, parts: dict[bytes, Box]) -> list[Box]:
    """The property boxes of the primary item, in the order in which they are to be applied.

    Raises:
        InvalidImage: there are none, or one is named that is not there.
    """
    item = primary_item(data, parts)
    if b"iprp" not in parts:
        raise missing(b"iprp")
    lists = list(boxes(data, parts[b"iprp"]))
    known = list(boxes(data, child(data, parts[b"iprp"], b"ipco")))
    indices: list[int] = []
    for box in [box for box in lists if box.kind == b"ipma"][:_MAX_LISTS]:
        indices += _associated(data, box, item)
    if any(index > len(known) for index in indices):
        raise damaged("HEIF or AVIF", "a property that is not there")
    return [known[index - 1] for index in indices if index]


def _associated(data: bytes, ipma: Box, item: int) -> list[int]:
    """The numbers (from 1 on; 0 for none) of the properties that `ipma` gives to `item`."""
    number_bytes = id_bytes(data, ipma)
    bytes_each, mask = (2, 0x7FFF) if data[ipma.start + 3] & 1 else (1, 0x7F)
    fields = Fields(data, ipma.start + FULL)
    for _ in range(min(fields.take(4), MAX_STEPS)):
        if fields.at >= ipma.end:
            break
        number = fields.take(number_bytes)
        length = fields.take(1)
        if number == item:
            return [fields.take(bytes_each) & mask for _ in range(length)]
        fields.at += length * bytes_each
    return []
