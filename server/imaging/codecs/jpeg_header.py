"""The header of a JPEG for the reduced decoder, which supports no unusual files."""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Factors: TypeAlias = npt.NDArray[np.float32]

# The most coefficients that the decoder uses, in zigzag order.
USED_FACTORS = 10
_MAX_SEGMENTS = 256


class Unsupported(Exception):
    """The reduced decoder does not support the file."""


class Component(NamedTuple):
    """`h` and `v` are the sampling factors, `tables` the numbers of the DC and AC tables."""

    identifier: int
    h: int
    v: int
    quantiser: int
    tables: tuple[int, int]


class JpegHeader(NamedTuple):
    """What precedes the scan. `interval` is the restart interval in MCUs (0: none); `scan` is the
    offset of its data; `huffman` has (class << 4 | number, counts and values) of each table."""

    size: tuple[int, int]
    components: list[Component]
    quantisers: dict[int, Factors]
    huffman: tuple[tuple[int, bytes], ...]
    interval: int
    scan: int


def expect(condition: bool) -> None:
    """Raises Unsupported if `condition` is false."""
    if not condition:
        raise Unsupported


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and end of each segment before the scan's data."""
    expect(data[:2] == b"\xff\xd8")
    at = 2
    for _ in range(_MAX_SEGMENTS):
        expect(len(data) >= at + 4 and data[at] == 0xFF)
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        expect(at + 4 <= end <= len(data))
        yield data[at + 1], data[at + 4 : end], end
        at = end
    raise Unsupported


def parse(data: bytes) -> JpegHeader:
    """Read the header up to the scan. Raises Unsupported."""
    quantisers: dict[int, Factors] = {}
    huffman: dict[int, bytes] = {}
    interval, frame = 0, b""
    for marker, content, end in _segments(data):
        match marker:
            case 0xC0 | 0xC1:
                expect(not frame)
                frame = content
            case 0xC4:
                huffman.update(_huffman(content))
            case 0xDB:
                quantisers.update(_quantisers(content))
            case 0xDD:
                expect(len(content) == 2)
                interval = int.from_bytes(content)
            case 0xDA:
                components = _components(frame, content)
                size = int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])
                tables = tuple(sorted(huffman.items()))
                return JpegHeader(size, components, quantisers, tables, interval, end)
            case 0xEE if content.startswith(b"Adobe"):
                expect(len(content) >= 12 and content[11] == 1)  # else it is RGB or CMYK
            case _:
                expect(0xE0 <= marker <= 0xEF or marker == 0xFE)
    raise Unsupported


def _huffman(content: bytes) -> Iterator[tuple[int, bytes]]:
    expect(len(content) <= 4 * (17 + 256))
    while content:
        length = 17 + sum(content[1:17])
        expect(length <= min(len(content), 17 + 256) and content[0] in (0x00, 0x01, 0x10, 0x11))
        expect(content[0] >= 0x10 or max(content[17:length], default=0) <= 15)  # a DC symbol
        yield content[0], content[1:length]
        content = content[length:]


def _quantisers(content: bytes) -> Iterator[tuple[int, Factors]]:
    """The factors of the coefficients that are used, in zigzag order."""
    expect(len(content) <= 4 * (1 + 2 * 64))
    while content:
        precision, number = content[0] >> 4, content[0] & 15
        length = 1 + 64 * (precision + 1)
        expect(precision < 2 and length <= len(content))
        factors = np.frombuffer(content[1:length], ">u2" if precision else "u1")
        yield number, factors[:USED_FACTORS].astype(np.float32)
        content = content[length:]


def _components(frame: bytes, scan: bytes) -> list[Component]:
    """The components, from the headers of the frame and the scan."""
    expect(len(frame) > 6 and frame[0] == 8 and frame[5] in (1, 3))
    count = frame[5]
    expect(len(frame) == 6 + 3 * count and len(scan) == 4 + 2 * count and scan[0] == count)
    expect(scan[-3:] == b"\x00\x3f\x00")  # all coefficients in one scan
    components = []
    for i in range(count):
        identifier, sampling, quantiser = frame[6 + 3 * i : 9 + 3 * i]
        selected, tables = scan[1 + 2 * i : 3 + 2 * i]
        expect(selected == identifier and tables in (0x00, 0x01, 0x10, 0x11))
        h, v = sampling >> 4, sampling & 15
        expect(1 <= h <= 4 and 1 <= v <= 4)
        if count == 1:  # then an MCU has one block, whatever the sampling factors are
            h = v = 1
        components.append(Component(identifier, h, v, quantiser, (tables >> 4, tables & 15)))
    expect([component.identifier for component in components] != list(b"RGB"))
    expect(components[0].h in (1, 2) and components[0].v in (1, 2))
    expect(all((component.h, component.v) == (1, 1) for component in components[1:]))
    return components
