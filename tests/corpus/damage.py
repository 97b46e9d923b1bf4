"""Files of every format truncated, overwritten in the middle, and with flipped header bits."""

import functools
import random
from collections.abc import Iterator

from tests.corpus.cases import INVALID, SURVIVES, UNSUPPORTED, Case
from tests.corpus.encoded import FORMATS, MAGIC_BYTES, MIMES
from tests.corpus.scenes import noise
from tests.pictures import encode

# Where the header of each format is cut: after the magic, before the size is complete.
_IN_HEADER = {
    "jpeg": 12, "png": 20, "webp": 24, "gif": 8, "bmp": 20, "tiff": 20, "avif": 40, "heic": 40,
}  # fmt: skip
_ZONE_BYTES = 64
# Position as a fraction of the length, and seed: in a JPEG, some noise is valid codes.
_ZONES = ((0.3, 2), (0.5, 0), (0.8, 4))
# Files whose decoder checks all data, so that damage is always detected.
_CHECKED = ("png", "jpeg")


@functools.cache
def _file(kind: str) -> bytes:
    if kind == "jpeg":  # the usual one; its chroma is subsampled
        return encode(noise(), "JPEG", quality=90)
    return FORMATS[kind](noise())


def cut(kind: str, length: int | float) -> bytes:
    """The beginning of a file, by a number of bytes or a fraction of its length."""
    data = _file(kind)
    return data[: length if isinstance(length, int) else int(length * len(data))]


def overwritten(data: bytes, where: float, seed: int) -> bytes:
    """`data` with 64 bytes at a fraction of its length overwritten by noise."""
    at = int(where * len(data))
    zone = random.Random(seed).randbytes(_ZONE_BYTES)
    return data[:at] + zone + data[at + _ZONE_BYTES :]


def turned(data: bytes, seed: int, magic_bytes: int) -> bytes:
    """`data` with three bits flipped in the 100 bytes after its magic."""
    damaged, choose = bytearray(data), random.Random(seed)
    for _ in range(3):
        damaged[choose.randrange(magic_bytes, magic_bytes + 100)] ^= 1 << choose.randrange(8)
    return bytes(damaged)


def cases() -> Iterator[Case]:
    for kind, mime in MIMES.items():
        yield from _truncations(kind, mime)
        for where, seed in _ZONES:
            expected = INVALID if kind in _CHECKED else SURVIVES
            make = functools.partial(_overwritten, kind, where, seed)
            yield Case(f"{kind}/overwritten-at-{where * 100:.0f}", make, expected, mime)
        for seed in range(3):
            make = functools.partial(_turned, kind, seed)
            yield Case(f"{kind}/turned-bits-{seed}", make, SURVIVES, mime)
    yield Case("jpeg/progressive-cut", lambda: _progressive()[:3000], INVALID, "image/jpeg")
    yield Case(
        "jpeg/progressive-overwritten",
        lambda: overwritten(_progressive(), 0.5, 7),
        INVALID,
        "image/jpeg",
    )


def _truncations(kind: str, mime: str) -> Iterator[Case]:
    magic = MAGIC_BYTES[kind]
    places = {"in-magic": magic // 2, "in-header": _IN_HEADER[kind]}
    for name, length in places.items():
        expected = UNSUPPORTED if name == "in-magic" else INVALID
        yield Case(f"{kind}/cut-{name}", functools.partial(cut, kind, length), expected, mime)
    for part in (0.3, 0.6, 0.95):
        make = functools.partial(cut, kind, part)
        yield Case(f"{kind}/cut-at-{part * 100:.0f}", make, INVALID, mime)


def _overwritten(kind: str, where: float, seed: int) -> bytes:
    return overwritten(_file(kind), where, seed)


def _turned(kind: str, seed: int) -> bytes:
    return turned(_file(kind), seed, MAGIC_BYTES[kind])


@functools.cache
def _progressive() -> bytes:
    return encode(noise(), "JPEG", quality=90, progressive=True)
