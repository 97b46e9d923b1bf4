"""JPEG, marker by marker, with flat 8x8 blocks: each block is its mean, the DC coefficient."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.corpus.writers import bits

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
APP0, APP1, APP2, APP14, COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
SOF0, SOF2, SOF3, SOF9 = 0xC0, 0xC2, 0xC3, 0xC9
DHT, DQT, DRI, SOS, DNL = 0xC4, 0xDB, 0xDD, 0xDA, 0xDC
JFIF = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"

# DC differences of 0 to 11 bits have codes of 4 bits; "end of block" is the one AC code, "0".
_DC_TABLE = b"\x00" + bytes([0, 0, 0, 12, *[0] * 12]) + bytes(range(12))
_AC_TABLE = b"\x10" + bytes([1, *[0] * 15]) + b"\x00"
_DC_BITS, _END_OF_BLOCK = 4, "0"
# With a quantiser step of 8, one step of the DC coefficient is one grey level of the block.
_QUANT = b"\x00" + bytes([8] * 64)


@dataclass(frozen=True)
class Plane:
    """A component: sampling factors and a grey level for each block, uint8 (rows, columns)."""

    levels: np.ndarray
    h: int = 1
    v: int = 1


def segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def sof(
    size: tuple[int, int], factors: Sequence[tuple[int, int]], kind: int = SOF0, bits: int = 8
) -> bytes:
    """The frame header; `factors` are (h, v) of each component."""
    width, height = size
    head = struct.pack(">BHHB", bits, height, width, len(factors))
    return segment(
        kind, head + b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(factors))
    )


def sos(components: int, spectrum: tuple[int, int] = (0, 63), approximation: int = 0) -> bytes:
    chosen = b"".join(bytes([i + 1, 0]) for i in range(components))
    return segment(SOS, bytes([components]) + chosen + bytes([*spectrum, approximation]))


def tables() -> bytes:
    return segment(DQT, _QUANT) + segment(DHT, _DC_TABLE) + segment(DHT, _AC_TABLE)


def scan(planes: Sequence[Plane], size: tuple[int, int], restart: int = 0) -> bytes:
    """Entropy-coded data of one interleaved baseline scan; a restart marker per `restart` MCUs."""
    width, height = size
    across = -(-width // (8 * max(p.h for p in planes)))
    down = -(-height // (8 * max(p.v for p in planes)))
    pieces: list[bytes] = []
    text, last = [""], [128] * len(planes)
    for mcu in range(across * down):
        if restart and mcu and mcu % restart == 0:
            pieces.append(_stuffed("".join(text)) + bytes([0xFF, 0xD0 + len(pieces) % 8]))
            text, last = [""], [128] * len(planes)
        row, column = divmod(mcu, across)
        for number, plane in enumerate(planes):
            for block in range(plane.h * plane.v):
                y, x = divmod(block, plane.h)
                level = _level(plane, row * plane.v + y, column * plane.h + x)
                text.append(_dc(level - last[number]) + _END_OF_BLOCK)
                last[number] = level
    return b"".join(pieces) + _stuffed("".join(text))


def _level(plane: Plane, row: int, column: int) -> int:
    rows, columns = plane.levels.shape
    return int(plane.levels[min(row, rows - 1), min(column, columns - 1)])


def _dc(difference: int) -> str:
    width = abs(difference).bit_length()
    value = difference if difference > 0 else difference + (1 << width) - 1
    return f"{width:0{_DC_BITS}b}" + (f"{value:0{width}b}" if width else "")


def _stuffed(text: str) -> bytes:
    return bits.from_text(text).replace(b"\xff", b"\xff\0")


def grey_blocks(size: tuple[int, int]) -> bytes:
    """Entropy-coded data of a mid-grey baseline picture of one component and any size."""
    width, height = size
    blocks = -(-width // 8) * -(-height // 8)
    return bytes(-(-blocks * (_DC_BITS + 1) // 8))


def jpeg(*segments: bytes) -> bytes:
    """SOI, `segments`, EOI."""
    return SOI + b"".join(segments) + EOI


def baseline(
    size: tuple[int, int], planes: Sequence[Plane], *before: bytes, restart: int = 0
) -> bytes:
    """A complete file that begins with the segments `before`."""
    interval = segment(DRI, struct.pack(">H", restart)) if restart else b""
    frame = sof(size, [(p.h, p.v) for p in planes])
    body = scan(planes, size, restart)
    return jpeg(*before, tables(), interval, frame, sos(len(planes)), body)


def many_scans(size: tuple[int, int], scans: int) -> bytes:
    """A mid-grey progressive picture of `scans` scans, legal up to 883, each over every block.

    After the DC scan come, for each of the 63 AC coefficients, one first scan and 13 that refine
    it by a bit. A scan is runs of 16384 blocks without a coefficient: a few bytes, all of it work.
    """
    width, height = size
    blocks = -(-width // 8) * -(-height // 8)
    run_of_empty_blocks = b"\x10" + bytes([1, *[0] * 15]) + b"\xe0"
    dc = sos(1, (0, 0)) + bytes(-(-blocks * _DC_BITS // 8))
    empty = bytes(-(-15 * -(-blocks // 16384) // 8))
    levels = [0x0D, *(high << 4 | high - 1 for high in range(13, 0, -1))]
    steps = [(k, level) for k in range(1, 64) for level in levels][: scans - 1]
    ac = b"".join(sos(1, (k, k), level) + empty for k, level in steps)
    head = segment(DQT, _QUANT) + segment(DHT, _DC_TABLE) + segment(DHT, run_of_empty_blocks)
    return jpeg(segment(APP0, JFIF), head, sof(size, [(1, 1)], SOF2), dc, ac)


def after_soi(data: bytes, *segments: bytes) -> bytes:
    """`data` with `segments` inserted after its SOI."""
    return SOI + b"".join(segments) + data[2:]


def patched_size(data: bytes, size: tuple[int, int]) -> bytes:
    """`data` with another size in its frame header."""
    at = next(at for marker, at, _ in markers(data) if marker in (SOF0, SOF2))
    width, height = size
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def markers(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, offset of its 0xFF, bytes with the marker) of each segment up to the first scan."""
    found, at = [], 2
    while at + 4 <= len(data):
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        found.append((marker, at, length + 2))
        at += length + 2
        if marker == SOS:
            break
    return found


def without(data: bytes, marker: int) -> bytes:
    """`data` without its segments of one kind."""
    for kind, at, length in reversed(markers(data)):
        if kind == marker:
            data = data[:at] + data[at + length :]
    return data
