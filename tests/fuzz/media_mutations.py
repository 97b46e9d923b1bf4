"""Mutations of image files of every format, of PDFs, and of videos.

Input number `index` of a run with some `seed` depends only on these two numbers, so that a finding
can be reproduced without its file.
"""

import functools
import random
import re
import struct
import zlib

from tests import clips, encoded, hostile_pdfs, media, pictures
from tests.fuzz import fuzz_header

# Values at which readers of lengths, counts and sizes go wrong.
_NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 1023, 32_767, 32_768, 65_535, 65_536),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1),
)
_WORDS = (
    *(b"1 0 R", b"2 0 R", b"3 0 R", b"99 0 R", b"null", b"<<", b">>", b"[", b"]", b"()", b"/"),
    *(b"true", b"1e30", b"nan", b".001", b"-1", b"2147483648", b"obj", b"endobj", b"stream"),
    *(b"/Kids", b"/Parent", b"/Length", b"/Count", b"/MediaBox [0 0 1e9 1]", b"/F Do", b"q", b"sh"),
)
_WORD = re.compile(rb"[^\s<>\[\]()/]+|/\w*|<<|>>|[\[\]]")
MAX_SEED_BYTES = 40_000


def mutated(seed: int, index: int) -> bytes:
    """Input number `index`: a seed file with one to six changes."""
    rng = random.Random(f"media {seed} {index}")
    data = changed(rng, rng.choice(seeds()))
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        try:
            return fuzz_header.with_checksums(bytes(data))
        except (struct.error, IndexError):
            return bytes(data)
    return bytes(data)


def mutated_video(seed: int, index: int) -> bytes:
    """Video number `index`, with changes as in `mutated`."""
    rng = random.Random(f"video {seed} {index}")
    return bytes(changed(rng, rng.choice(video_seeds())))


def changed(rng: random.Random, seed: bytes) -> bytearray:
    """`seed` with one to six changes."""
    data = bytearray(seed)
    is_pdf = data.startswith(b"%PDF")
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if is_pdf and rng.random() < 0.7:
            data = _change_word(rng, data)
        else:
            rng.choice((_flip, _put_number, _copy, _cut, _truncate, _insert))(rng, data)
        if not data:
            break
    return data


@functools.cache
def video_seeds() -> tuple[bytes, ...]:
    """Small videos in every container."""
    kinds = ((".mp4", "mp4v"), (".mkv", "FFV1"), (".webm", "VP80"), (".mov", "mp4v"))
    return tuple(clips.video(suffix, codec, frames=4, size=(32, 24)) for suffix, codec in kinds)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Small files: every image format and mode, and PDFs, usual and odd."""
    photo = pictures.photo((37, 23), 1)
    files = [*fuzz_header.seeds().values(), *encoded.files(photo).values()]
    for mode in ("F", "I", "I;16", "LA", "LAB", "CMYK", "YCbCr"):
        image = photo.convert("L").convert(mode) if mode in ("F", "I", "I;16", "LA") else None
        image = image or (fuzz_header.picture("LAB") if mode == "LAB" else photo.convert(mode))
        files.append(pictures.encode(image, "TIFF", compression="tiff_adobe_deflate"))
    odd = hostile_pdfs.odd()
    del odd["form that draws itself"]
    pdfs = [media.pdf((30, 20), (20, 30)), hostile_pdfs.nested_forms(2, 2), *odd.values()]
    plain = b"q 0 0 1 rg 3 3 20 9 re f Q BT /F1 9 Tf (abc) Tj ET 5 5 m 9 9 l 4 4 3 3 2 2 c S"
    pdfs += [_unpacked(hostile_pdfs.page(content=plain))] * 20
    return tuple(data for data in files + pdfs if len(data) <= MAX_SEED_BYTES)


def _unpacked(data: bytes) -> bytes:
    """A PDF whose content is not compressed, so that its words can be changed."""
    start, end = data.index(b"stream\n") + 7, data.index(b"\nendstream")
    content = zlib.decompress(data[start:end])
    head = data[:start].replace(b"/Filter /FlateDecode", b"")
    return head + content + data[end:]


def _place(rng: random.Random, data: bytearray) -> int:
    """A place, more often near the start, where the headers are."""
    return rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))


def _flip(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _put_number(rng: random.Random, data: bytearray) -> None:
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
    number = rng.choice(_NUMBERS) % 256**width
    at = _place(rng, data)
    data[at : at + width] = number.to_bytes(width, "big" if order == "big" else "little")


def _copy(rng: random.Random, data: bytearray) -> None:
    start, at = _place(rng, data), _place(rng, data)
    data[at:at] = data[start : start + rng.choice((1, 8, 64, 500))]


def _cut(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 4, 30, 500))]


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = rng.choice((bytes(9), b"\xff" * 9, rng.randbytes(20)))


def _change_word(rng: random.Random, data: bytearray) -> bytearray:
    """Replace, repeat or add a word of a PDF."""
    found = list(_WORD.finditer(data))
    if not found:
        return data
    word, other = rng.choice(found), rng.choice(found)
    new = rng.choice((rng.choice(_WORDS), other[0], b"%d" % rng.choice(_NUMBERS)))
    start = word.start() if rng.random() < 0.7 else word.end()
    times = rng.choice((1, 1, 1, 3, 50))
    return data[:start] + b" " + (new + b" ") * times + data[word.end() :]
