"""AVIF and HEIC: false, nested and endless boxes, and rotated pictures."""

import functools
import struct
from collections.abc import Callable, Iterator

from tests.corpus.cases import (
    INVALID,
    INVALID_OR_TOO_LARGE,
    INVALID_OR_UNSUPPORTED,
    SURVIVES,
    Case,
    Expectation,
    named,
    solid,
)
from tests.corpus.encoded import FORMATS, MIMES, Encode
from tests.corpus.scenes import CORNERS, SIZE, circle, quadrants, stored, upright
from tests.corpus.writers import boxes
from tests.corpus.writers.boxes import box
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RIGHT = upright(30)
# EXIF orientation -> counterclockwise quarter turns of the equivalent `irot`.
_TURNS = {1: 0, 8: 1, 3: 2, 6: 3}


def cases() -> Iterator[Case]:
    for kind in ("avif", "heic"):
        plain = functools.cache(functools.partial(FORMATS[kind], quadrants()))
        groups = (_pictures(FORMATS[kind]), _boxes(plain), _brands(kind, plain), _sizes(plain))
        for group in groups:
            for name, make, expected in group:
                yield Case(f"{kind}/{name}", make, expected, MIMES[kind])
    yield Case("avif/transparent", _transparent, solid((255,) * 3, SIZE, 4), "image/avif")
    yield Case("avif/10-bit", _deep_avif, SURVIVES, "image/avif")
    yield Case("avif/animated", _animated, SURVIVES, "image/avif")


def _pictures(encoded: Encode) -> Group:
    yield "plain", lambda: encoded(quadrants()), _RIGHT
    yield "circle", lambda: encoded(circle()), named("a red circle")
    yield "of-odd-size", lambda: encoded(quadrants((95, 63))), upright_of((95, 63))
    for orientation, turns in _TURNS.items():
        make = functools.partial(_turned, encoded, orientation, turns)
        yield f"turned-{90 * turns}", make, _RIGHT
    grey = box(b"irot", b"\xff")
    yield "turned-by-255", lambda: boxes.with_property(encoded(quadrants()), grey), SURVIVES
    for axis in (0, 1):
        flip = box(b"imir", bytes([axis]))
        make = functools.partial(_flipped, encoded, flip)
        yield f"mirrored-{axis}", make, SURVIVES
    crop = box(b"clap", struct.pack(">8I", 1 << 31, 1, 1 << 31, 1, 0, 1, 0, 1))
    yield "aperture-larger", lambda: boxes.with_property(encoded(quadrants()), crop), SURVIVES


def upright_of(size: tuple[int, int]) -> Expectation:
    return Expectation(answered=True, corners=CORNERS, size=size, tolerance=30)


def _turned(encoded: Encode, orientation: int, turns: int) -> bytes:
    return boxes.with_property(encoded(stored(orientation)), box(b"irot", bytes([turns])))


def _flipped(encoded: Encode, flip: bytes) -> bytes:
    return boxes.with_property(encoded(quadrants()), flip)


def _transparent() -> bytes:
    image = quadrants().copy()
    image.putalpha(0)
    return FORMATS["avif"](image)


def _deep_avif() -> bytes:
    """A header that declares ten bits for a stream of eight."""
    data = FORMATS["avif"](quadrants())
    at, _ = boxes.find(data, b"av1C")
    return data[: at + 10] + bytes([data[at + 10] | 0x40]) + data[at + 11 :]


def _animated() -> bytes:
    frames = [quadrants().rotate(180)] * 3
    data = encode(quadrants(), "AVIF", save_all=True, append_images=frames, max_threads=1)
    for kind in (b"mvhd", b"tkhd", b"mdhd"):  # they contain the time of day
        at = data.index(kind) + 8
        length = 16 if data[at - 4] == 1 else 8
        data = data[:at] + bytes(length) + data[at + length :]
    return data


def _boxes(plain: Callable[[], bytes]) -> Group:
    def head() -> bytes:
        return plain()[: boxes.find(plain(), b"meta")[0]]

    yield "last-box-to-the-end", lambda: boxes.with_size(plain(), b"mdat", 0), _RIGHT
    for kind in (b"meta", b"iprp", b"ipco", b"iloc", b"ispe"):
        for size in (0, 1, 7, 0x7FFFFFFF):
            make = functools.partial(_resized, plain, kind, size)
            expected = INVALID if size == 0x7FFFFFFF and kind != b"meta" else SURVIVES
            yield f"{kind.decode()}-of-{size}", make, expected
    yield "ftyp-of-0", lambda: boxes.with_size(plain(), b"ftyp", 0), INVALID_OR_UNSUPPORTED
    yield (
        "ftyp-of-4-gb",
        lambda: boxes.with_size(plain(), b"ftyp", 0xFFFFFFFF),
        INVALID_OR_UNSUPPORTED,
    )
    yield "ftyp-only", head, INVALID
    yield "boxes-nested-5000", lambda: head() + _nested(5000), INVALID
    yield "properties-nested-5000", lambda: head() + boxes.full(b"meta", _nested(5000)), INVALID
    yield (
        "empty-boxes-50000",
        lambda: head() + box(b"free") * 50_000 + plain()[len(head()) :],
        SURVIVES,
    )
    yield "box-of-64-bit-size", lambda: head() + _huge_box(), INVALID
    yield "properties-100000", lambda: head() + _many_properties(), INVALID
    yield "item-data-beyond-the-end", lambda: _moved(plain(), 1 << 30), INVALID
    yield "item-data-in-the-header", lambda: _moved(plain(), 0), SURVIVES
    yield "trailing-box", lambda: plain() + box(b"free", bytes(100)), _RIGHT


def _resized(plain: Callable[[], bytes], kind: bytes, size: int) -> bytes:
    return boxes.with_size(plain(), kind, size)


def _nested(depth: int) -> bytes:
    """Nested containers, each with the right size."""
    sizes = range(8 * depth, 0, -8)
    kinds = (b"iprp", b"ipco", b"moov", b"trak")
    return b"".join(struct.pack(">I", size) + kinds[n % 4] for n, size in enumerate(sizes))


def _huge_box() -> bytes:
    return struct.pack(">I4sQ", 1, b"meta", (1 << 63) - 1) + bytes(100)


def _many_properties() -> bytes:
    ispe = boxes.full(b"ispe", struct.pack(">II", *SIZE))
    return boxes.full(b"meta", box(b"iprp", box(b"ipco", ispe * 100_000)))


def _moved(data: bytes, offset: int) -> bytes:
    """`iloc` says that the first item's data is at `offset`."""
    mdat_at, _ = boxes.find(data, b"mdat")
    iloc_at, size = boxes.find(data, b"iloc")
    at = data.index(struct.pack(">I", mdat_at + 8), iloc_at, iloc_at + size)
    return data[:at] + struct.pack(">I", offset) + data[at + 4 :]


def _brands(kind: str, plain: Callable[[], bytes]) -> Group:
    def branded(major: bytes, *more: bytes) -> Callable[[], bytes]:
        return functools.partial(_rebranded, plain, major, more)

    own = kind.encode()
    yield "brand-mif1", branded(b"mif1", b"mif1", own, b"miaf"), _RIGHT
    yield "brand-of-the-other", branded(b"heic" if kind == "avif" else b"avif"), SURVIVES
    yield "brand-unknown", branded(b"zzzz"), INVALID_OR_UNSUPPORTED
    yield "brands-10000", branded(own, *[b"zzzz"] * 10_000), SURVIVES


def _rebranded(plain: Callable[[], bytes], major: bytes, more: tuple[bytes, ...]) -> bytes:
    """Other brands, with the rest of the file shifted by the difference in length."""
    data, brand = plain(), boxes.ftyp(major, *more)
    _, size = boxes.find(data, b"ftyp")
    return boxes.with_shifted_items(brand + data[size:], 0, len(brand) - size)


def _sizes(plain: Callable[[], bytes]) -> Group:
    yield "says-larger", lambda: boxes.with_ispe(plain(), 200, 200), SURVIVES
    yield "says-smaller", lambda: boxes.with_ispe(plain(), 16, 16), SURVIVES
    yield "says-0x0", lambda: boxes.with_ispe(plain(), 0, 0), INVALID
    yield (
        "says-4-billion",
        lambda: boxes.with_ispe(plain(), 0xFFFFFFFF, 0xFFFFFFFF),
        INVALID_OR_TOO_LARGE,
    )
