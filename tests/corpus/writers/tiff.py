"""TIFF files and EXIF blocks (which have the same structure): directories of tags."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16
_CODES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", UNDEFINED: "B", LONG8: "Q"}

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
COLOR_MAP, SAMPLE_FORMAT, SUB_IFDS, EXIF_IFD = 320, 339, 330, 34665
THUMBNAIL, THUMBNAIL_BYTES, MAKER_NOTE = 513, 514, 37500
IMAGE_ID, IMAGE_UNIQUE_ID = 32781, 42016

LZW, JPEG, DEFLATE, PACKBITS, OLD_JPEG = 5, 7, 8, 32773, 6
WHITE_IS_ZERO, GREY, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8


@dataclass(frozen=True)
class Tag:
    """`values` are numbers or bytes; `count` and `offset` replace the right ones."""

    number: int
    kind: int
    values: Sequence[int] | bytes
    count: int | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Layout:
    """Byte order ("<" or ">"), and whether the file is BigTIFF."""

    order: Literal["<", ">"] = "<"
    big: bool = False

    def header(self, first_ifd: int) -> bytes:
        mark = b"II" if self.order == "<" else b"MM"
        if self.big:
            return mark + struct.pack(self.order + "HHHQ", 43, 8, 0, first_ifd)
        return mark + struct.pack(self.order + "HI", 42, first_ifd)

    @property
    def header_bytes(self) -> int:
        return 16 if self.big else 8

    def ifd(self, tags: Sequence[Tag], at: int, next_ifd: int = 0) -> bytes:
        """A directory at offset `at`, followed by its long values."""
        count, number, inline = ("Q", "Q", 8) if self.big else ("H", "I", 4)
        entry_bytes = 4 + 2 * inline
        end = at + struct.calcsize(self.order + count) + entry_bytes * len(tags) + inline
        entries, long_values = b"", b""
        for tag in sorted(tags, key=lambda tag: tag.number):
            value = self._packed(tag)
            length = len(tag.values) if tag.count is None else tag.count
            entries += struct.pack(self.order + "HH" + number, tag.number, tag.kind, length)
            if tag.offset is not None:
                entries += struct.pack(self.order + number, tag.offset)
            elif len(value) <= inline:
                entries += value.ljust(inline, b"\0")
            else:
                entries += struct.pack(self.order + number, end + len(long_values))
                long_values += value + b"\0" * (len(value) % 2)
        head = struct.pack(self.order + count, len(tags))
        return head + entries + struct.pack(self.order + number, next_ifd) + long_values

    def _packed(self, tag: Tag) -> bytes:
        if isinstance(tag.values, bytes):
            return tag.values
        return struct.pack(f"{self.order}{len(tag.values)}{_CODES[tag.kind]}", *tag.values)


LITTLE, BIG = Layout(), Layout(big=True)


def picture_tags(size: tuple[int, int], bits: Sequence[int], photometric: int) -> list[Tag]:
    """The tags that every picture has, without the position of its data."""
    return [
        Tag(WIDTH, LONG, [size[0]]),
        Tag(HEIGHT, LONG, [size[1]]),
        Tag(BITS, SHORT, bits),
        Tag(PHOTOMETRIC, SHORT, [photometric]),
        Tag(SAMPLES, SHORT, [len(bits)]),
    ]


def strips(data: Sequence[bytes], at: int, rows: int) -> list[Tag]:
    """The tags of consecutive strips from offset `at` on."""
    offsets = [at + sum(map(len, data[:number])) for number in range(len(data))]
    return [
        Tag(STRIP_OFFSETS, LONG, offsets),
        Tag(STRIP_BYTES, LONG, [len(strip) for strip in data]),
        Tag(ROWS, LONG, [rows]),
    ]


def tiff(
    size: tuple[int, int],
    data: Sequence[bytes],
    bits: Sequence[int] = (8, 8, 8),
    photometric: int = RGB,
    *more: Tag,
    layout: Layout = LITTLE,
    next_ifd: int = 0,
) -> bytes:
    """A file of one picture: header, strips, directory. `more` tags replace those of the picture;
    without a COMPRESSION the strips are not compressed."""
    at = layout.header_bytes
    rows = -(-size[1] // max(1, len(data) // (len(bits) if _is_planar(more) else 1)))
    tags = {COMPRESSION: Tag(COMPRESSION, SHORT, [1])}
    chosen = [*picture_tags(size, bits, photometric), *strips(data, at, rows), *more]
    tags |= {tag.number: tag for tag in chosen}
    body = b"".join(data)
    body += b"\0" * (len(body) % 2)
    ifd_at = at + len(body)
    return layout.header(ifd_at) + body + layout.ifd(list(tags.values()), ifd_at, next_ifd)


def _is_planar(tags: Sequence[Tag]) -> bool:
    return any(tag.number == PLANAR and list(tag.values) == [2] for tag in tags)


def samples(pixels: np.ndarray, layout: Layout = LITTLE) -> bytes:
    """The bytes of an array in the file's byte order."""
    return pixels.astype(pixels.dtype.newbyteorder(layout.order)).tobytes()


def exif(*tags: Tag, layout: Layout = LITTLE, thumbnail: Sequence[Tag] = ()) -> bytes:
    """An EXIF block: a directory, and a second one if there is a `thumbnail`."""
    at = layout.header_bytes
    first = layout.ifd(tags, at)
    if thumbnail:
        next_at = at + len(first)
        first = layout.ifd(tags, at, next_at) + layout.ifd(thumbnail, next_at)
    return layout.header(at) + first


def oriented(orientation: int) -> bytes:
    """An EXIF block with the orientation."""
    return exif(Tag(ORIENTATION, SHORT, [orientation]))
