"""Mutations of JPEG files, most of which still pass the header reader.

Input number `index` of a run with some `seed` depends only on these two numbers, so that a finding
can be reproduced without its file.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tests import pictures
from tests.corpus import jpeg_cases
from tests.corpus.writers import jpeg

MAX_SEED_BYTES = 40_000
MAX_BYTES = 200_000

SOI, EOI, RST0 = 0xD8, 0xD9, 0xD0
SOF_KINDS = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA)
# Corpus files of many scans take minutes and are of no use as seeds.
_SLOW = ("-scans", "taller-than", "20000", "of-3-mb")


@dataclass
class Segment:
    """A marker with its contents; `scan` is the entropy-coded data after it.

    `length` replaces the true length field. Markers without contents have None.
    """

    marker: int
    content: bytearray | None
    scan: bytearray = field(default_factory=bytearray)
    length: int | None = None


File = list[Segment]


def split(data: bytes) -> File:
    """The segments of a JPEG; bytes between segments belong to the one before them."""
    file: File = []
    at = 0
    while at + 2 <= len(data):
        marker = data[at + 1]
        alone = marker in (SOI, EOI) or at + 4 > len(data)
        end = at + 2 if alone else at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
        content = None if alone else bytearray(data[at + 4 : end])
        following = _next_marker(data, end)
        file.append(Segment(marker, content, bytearray(data[end:following])))
        at = following
    return file


def _next_marker(data: bytes, at: int) -> int:
    """The offset of the next marker that is neither a stuffed byte nor a restart."""
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        if data[at + 1] not in (0x00, 0xFF, *range(RST0, RST0 + 8)):
            return at
        at += 1
    return len(data)


def join(file: File) -> bytes:
    out = bytearray()
    for segment in file:
        out += bytes((0xFF, segment.marker & 255))
        if segment.content is not None:
            length = len(segment.content) + 2 if segment.length is None else segment.length
            out += (length & 0xFFFF).to_bytes(2) + segment.content
        out += segment.scan
    return bytes(out)


# ---------------------------------------------------------------------- seeds


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """The corpus's JPEG files, and photos in each sampling, with and without restarts."""
    corpus = (case for case in jpeg_cases.cases() if not any(part in case.name for part in _SLOW))
    files = [data for case in corpus if len(data := case.make()) <= MAX_SEED_BYTES]
    for number, options in enumerate(_options()):
        size = ((64, 48), (33, 70), (17, 9), (120, 88))[number % 4]
        files.append(pictures.encode(pictures.photo(size, number), "JPEG", **options))
    grey = pictures.photo((100, 75), 1).convert("L")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    files.append(pictures.encode(grey, "JPEG", quality=80))
    files.append(pictures.encode(grey, "JPEG", quality=80, restart_marker_blocks=3))
    files.append(pictures.encode(Image.fromarray(noise), "JPEG", quality=100))
    return tuple(files)


def _options() -> list[dict[str, object]]:
    kinds: tuple[dict[str, object], ...] = (
        {},
        {"optimize": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 5},
        {"progressive": True},
    )
    return [
        {"quality": quality, "subsampling": subsampling, **kind}
        for quality in (30, 75, 97)
        for subsampling in (0, 1, 2)
        for kind in kinds
    ]


def mutated(seed: int, index: int) -> bytes:
    """Input number `index`: a seed with one to six mutations, usually few."""
    rng = random.Random(f"{seed}/{index}")
    file = split(rng.choice(seeds()))
    while True:
        rng.choice(_MUTATIONS)(rng, file)
        if rng.random() < 0.5 or len(file) > 500:
            break
    data = join(file)
    if rng.random() < 0.3:
        data = _with_other_bytes(rng, data)
    return data[:MAX_BYTES]


# ---------------------------------------------------------------------- mutations

Mutation = Callable[[random.Random, File], None]


def _of(file: File, *markers: int) -> list[Segment]:
    """The segments of these kinds that have contents."""
    return [segment for segment in file if segment.marker in markers and segment.content]


def _content(rng: random.Random, file: File, *markers: int) -> bytearray:
    """Contents of one of the segments of these kinds; a dummy array if there are none."""
    found = _of(file, *markers)
    return (rng.choice(found).content or bytearray()) if found else bytearray(64)


def _put(content: bytearray, at: int, value: int) -> None:
    if at < len(content):
        content[at] = value & 255


def _change_length(rng: random.Random, file: File) -> None:
    segment = rng.choice(file)
    length = len(segment.content or b"") + 2
    choices = (0, 1, 2, 3, length - 1, length + 1, length + rng.randrange(300), 0xFFFF)
    segment.length = rng.choice(choices)


def _change_huffman_counts(rng: random.Random, file: File) -> None:
    content = _content(rng, file, jpeg.DHT)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(1, 17)
        if at < len(content):
            content[at] = rng.choice((0, 1, 255, content[at] ^ 1 << rng.randrange(4)))


def _change_huffman_values(rng: random.Random, file: File) -> None:
    content = _content(rng, file, jpeg.DHT)
    for _ in range(rng.randrange(1, 8)):
        _put(content, rng.randrange(17, max(18, len(content))), rng.randrange(256))


def _renumber_huffman(rng: random.Random, file: File) -> None:
    _put(_content(rng, file, jpeg.DHT), 0, rng.choice((0, 1, 2, 3, 0x10, 0x11, 0x12, 0x13, 0x20)))


def _draw_huffman(rng: random.Random, file: File) -> None:
    """Replace all tables by valid ones that no encoder would write."""
    tables = b"".join(bytes([number]) + _codes(rng) for number in (0x00, 0x01, 0x10, 0x11))
    file[:] = [segment for segment in file if segment.marker != jpeg.DHT]
    at = next((i for i, s in enumerate(file) if s.marker == jpeg.SOS), len(file))
    file.insert(at, Segment(jpeg.DHT, bytearray(tables)))


def _codes(rng: random.Random) -> bytes:
    """Counts and values of a table: mostly long, or mostly short codes; DC symbols are legal."""
    counts: list[int] = []
    free = 1
    greed = rng.choice((0.1, 0.5, 0.9, 0.99))
    for _ in range(16):
        free *= 2
        most = max(0, min(free - 1, 255 - sum(counts)))
        counts.append(rng.randrange(int(most * greed) + 1) if most else 0)
        free -= counts[-1]
    top = rng.choice((1, 16, 16, 16, 256))
    pool = rng.choice(((0x00,), (0xF0,), (0x0F,), (0x00, 0xF0, 0x01), tuple(range(top))))
    return bytes(counts) + bytes(rng.choice(pool) for _ in range(sum(counts)))


def _change_quantiser(rng: random.Random, file: File) -> None:
    content = _content(rng, file, jpeg.DQT)
    _put(content, 0, rng.choice((0, 1, 2, 3, 4, 0x10, 0x11, 0x20)))
    for _ in range(rng.randrange(5)):
        _put(content, rng.randrange(1, 65), rng.choice((0, 1, 255, rng.randrange(256))))
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)) :]


def _change_sampling(rng: random.Random, file: File) -> None:
    content = _content(rng, file, *SOF_KINDS)
    at = 7 + 3 * rng.randrange(4)
    common = (0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x44)
    _put(content, at, rng.choice((*common, 0, 0x10, 0x01, 0x33, 0xFF, rng.randrange(256))))


def _change_frame(rng: random.Random, file: File) -> None:
    content = _content(rng, file, *SOF_KINDS)
    match rng.randrange(5):
        case 0:
            _put(content, 0, rng.choice((1, 8, 12, 16, 255)))
        case 1:
            _put(content, 5, rng.choice((0, 1, 2, 3, 4, 5, 255)))
        case 2:
            _put(content, 8 + 3 * rng.randrange(4), rng.choice((0, 1, 2, 3, 4, 255)))
        case 3:
            _put(content, 6 + 3 * rng.randrange(4), rng.choice((0, 1, 2, 3, 82, 71, 66)))
        case 4:
            for segment in _of(file, *SOF_KINDS):
                segment.marker = rng.choice((*SOF_KINDS, rng.randrange(0xC0, 0xD0)))


def _change_size(rng: random.Random, file: File) -> None:
    content = _content(rng, file, *SOF_KINDS)
    for at in rng.sample((1, 3), rng.randrange(1, 3)):
        sides = (
            0,
            1,
            7,
            8,
            9,
            16,
            17,
            1000,
            4000,
            65535,
            rng.randrange(300),
            rng.randrange(1 << 16),
        )
        if len(content) >= 5:
            content[at : at + 2] = rng.choice(sides).to_bytes(2)


def _change_scan_header(rng: random.Random, file: File) -> None:
    """Components, their tables, and the progressive parameters Ss, Se, Ah and Al."""
    content = _content(rng, file, jpeg.SOS)
    match rng.randrange(4):
        case 0:
            _put(content, 0, rng.choice((0, 1, 2, 3, 4, 5, 255)))
        case 1:
            _put(content, 1 + 2 * rng.randrange(4), rng.choice((0, 1, 2, 3, 255)))
        case 2:
            numbers = (0x00, 0x01, 0x10, 0x11, 0x22, 0x33, 0xFF)
            _put(content, 2 + 2 * rng.randrange(4), rng.choice(numbers))
        case 3:
            which = rng.randrange(3)
            values = ((0, 1, 5, 63, 64, 255), (0, 1, 5, 62, 63, 64, 255), (0, 1, 0x10, 0x21, 0xDE))
            if len(content) >= 3:
                content[len(content) - 3 + which] = rng.choice(values[which])


def _change_restarts(rng: random.Random, file: File) -> None:
    interval = rng.choice((0, 1, 2, 3, 8, 255, 65535, rng.randrange(64)))
    for segment in _of(file, jpeg.DRI):
        segment.content = bytearray(interval.to_bytes(2))
        return
    file.insert(min(1, len(file)), Segment(jpeg.DRI, bytearray(interval.to_bytes(2))))


def _change_restart_markers(rng: random.Random, file: File) -> None:
    scan = rng.choice(file).scan if rng.random() < 0.1 else _scan(rng, file)
    places = [at for at in range(len(scan) - 1) if scan[at] == 0xFF and scan[at + 1] & 0xF8 == RST0]
    if not places or rng.random() < 0.3:
        at = rng.randrange(len(scan) + 1)
        scan[at:at] = bytes((0xFF, RST0 + rng.randrange(8)))
    elif rng.random() < 0.5:
        scan[rng.choice(places) + 1] = RST0 + rng.randrange(8)
    else:
        at = rng.choice(places)
        del scan[at : at + rng.choice((2, 2, 3, 9))]


def _scan(rng: random.Random, file: File) -> bytearray:
    found = [segment.scan for segment in file if segment.marker == jpeg.SOS]
    return rng.choice(found) if found else bytearray()


def _insert_dnl(rng: random.Random, file: File) -> None:
    if rng.random() < 0.7:
        content = _content(rng, file, *SOF_KINDS)
        content[1:3] = bytes(2)
    lines = rng.choice((0, 1, 8, 48, 65535, rng.randrange(200)))
    at = next((i + 1 for i, s in enumerate(file) if s.marker == jpeg.SOS), len(file))
    file.insert(rng.choice((at, rng.randrange(len(file) + 1))), Segment(
        jpeg.DNL, bytearray(lines.to_bytes(2))
    ))  # fmt: skip


def _truncate_scan(rng: random.Random, file: File) -> None:
    scan = _scan(rng, file)
    del scan[rng.choice((0, rng.randrange(len(scan) + 1), max(0, len(scan) - rng.randrange(20)))) :]
    if rng.random() < 0.3:
        file[:] = [segment for segment in file if segment.marker != EOI]


def _draw_scan(rng: random.Random, file: File) -> None:
    """Random, constant or repeated data in place of a scan, with or without byte stuffing."""
    scan = _scan(rng, file)
    length = rng.choice((1, 9, 100, 1000, 6000, len(scan)))
    match rng.randrange(4):
        case 0:
            data = rng.randbytes(length)
        case 1:
            data = bytes([rng.choice((0x00, 0x55, 0xFE, 0xFF, rng.randrange(256)))]) * length
        case 2:
            data = rng.randbytes(7) * (length // 7 + 1)
        case _:
            data = bytes(rng.choice((0, 0, 0, 1, 254, 255)) for _ in range(length))
    if rng.random() < 0.8:
        data = data.replace(b"\xff", b"\xff\0")
    scan[rng.choice((0, 0, rng.randrange(len(scan) + 1))) :] = data


def _damage_scan(rng: random.Random, file: File) -> None:
    scan = _scan(rng, file)
    scan[:] = _with_other_bytes(rng, bytes(scan))


def _drop(rng: random.Random, file: File) -> None:
    if len(file) > 1:
        del file[rng.randrange(1, len(file))]


def _repeat(rng: random.Random, file: File) -> None:
    chosen = rng.choice(file)
    copy = Segment(chosen.marker, bytearray(chosen.content or b""), bytearray(chosen.scan))
    file.insert(rng.randrange(1, len(file) + 1), copy)


def _move(rng: random.Random, file: File) -> None:
    if len(file) > 2:
        segment = file.pop(rng.randrange(1, len(file)))
        file.insert(rng.randrange(1, len(file) + 1), segment)


def _cross(rng: random.Random, file: File) -> None:
    """Take one kind of segment, or the scan, from another file."""
    other = split(rng.choice(seeds()))
    marker = rng.choice((jpeg.DHT, jpeg.DQT, jpeg.SOS, *SOF_KINDS))
    theirs = [segment for segment in other if segment.marker == marker]
    ours = [segment for segment in file if segment.marker == marker]
    for segment, taken in zip(ours, theirs, strict=False):
        segment.content, segment.scan = taken.content, taken.scan


def _insert_segment(rng: random.Random, file: File) -> None:
    contents = (
        b"Adobe\0d\0\0\0\0" + bytes([rng.randrange(3)]),
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"
        + bytes([rng.randrange(10)])
        + b"\0\0\0\0\0\0",
        b"JFIF\0\x01\x02\0\0\x01\0\x01\0\0",
        b"ICC_PROFILE\0\x01\x01" + rng.randbytes(200),
        rng.randbytes(rng.randrange(40)),
    )
    marker = rng.choice((0xEE, 0xE1, 0xE0, 0xE2, 0xFE, jpeg.DRI, rng.randrange(0x02, 0xFF)))
    file.insert(rng.randrange(1, len(file) + 1), Segment(marker, bytearray(rng.choice(contents))))


def _change_marker(rng: random.Random, file: File) -> None:
    rng.choice(file).marker = rng.randrange(1, 256)


def _change_contents(rng: random.Random, file: File) -> None:
    segment = rng.choice(file)
    if segment.content:
        segment.content = bytearray(_with_other_bytes(rng, bytes(segment.content)))


def _with_other_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few bits or bytes changed, inserted or removed."""
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at] = rng.choice((0x00, 0xFF))
            case 3 if len(out) > 50:
                del out[at : at + rng.randrange(1, 40)]
            case _:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(out)


_MUTATIONS: tuple[Mutation, ...] = (
    _change_length,
    _change_huffman_counts,
    _change_huffman_values,
    _change_huffman_values,
    _renumber_huffman,
    _draw_huffman,
    _draw_huffman,
    _change_quantiser,
    _change_sampling,
    _change_sampling,
    _change_frame,
    _change_size,
    _change_size,
    _change_scan_header,
    _change_scan_header,
    _change_restarts,
    _change_restart_markers,
    _change_restart_markers,
    _insert_dnl,
    _truncate_scan,
    _draw_scan,
    _draw_scan,
    _damage_scan,
    _damage_scan,
    _drop,
    _repeat,
    _move,
    _cross,
    _cross,
    _insert_segment,
    _change_marker,
    _change_contents,
)
