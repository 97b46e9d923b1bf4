"""GIF: animations, frames beyond the screen, and invalid LZW data."""

import functools
import struct
from collections.abc import Callable, Iterator

import numpy as np

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    INVALID_OR_TOO_LARGE,
    SURVIVES,
    TOO_LARGE,
    Case,
    Expectation,
    named,
    seen,
)
from tests.corpus.scenes import CORNERS, PALETTE, SIZE, WHITE, circle, indices, upright
from tests.corpus.writers import gif
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_SCREEN = gif.screen(*SIZE, PALETTE)
_RIGHT = upright(2)


def _lzw() -> bytes:
    return _coded(indices())


def _coded(pixels: np.ndarray) -> bytes:
    return gif.uncompressed(pixels.ravel().tolist())


def _frame() -> bytes:
    return gif.frame(SIZE, _lzw())


def _file(*blocks: bytes) -> bytes:
    return _SCREEN + b"".join(blocks) + gif.TRAILER


def cases() -> Iterator[Case]:
    for group in (_pictures(), _animations(), _sizes(), _streams()):
        yield from (
            Case(f"gif/{name}", make, expected, "image/gif") for name, make, expected in group
        )


def _pictures() -> Group:
    yield "plain", lambda: _file(_frame()), _RIGHT
    yield "circle", lambda: encode(circle(), "GIF"), named("a red circle")
    yield "version-87a", lambda: gif.screen(*SIZE, PALETTE, b"87a") + _frame() + gif.TRAILER, _RIGHT
    yield "version-99z", lambda: gif.screen(*SIZE, PALETTE, b"99z") + _frame(), SURVIVES
    yield "interlaced", _interlaced, _RIGHT
    yield (
        "transparent",
        lambda: _file(gif.control(0, 0), _frame()),
        seen((WHITE, *CORNERS[1:]), SIZE),
    )
    yield "no-palette", lambda: gif.screen(*SIZE) + _frame() + gif.TRAILER, SURVIVES
    yield "no-trailer", lambda: _SCREEN + _frame(), SURVIVES
    yield "trailing-script", lambda: _file(_frame()) + b";alert(document.domain)//", _RIGHT
    yield "script-as-size", _script, ACCEPTED
    yield "comments-300", lambda: _file(b"\x21\xfe\x01x\0" * 300, _frame()), _RIGHT
    yield "comments-20000", lambda: _file(b"\x21\xfe\x01x\0" * 20_000, _frame()), SURVIVES
    yield "comment-without-end", lambda: _SCREEN + b"\x21\xfe" + b"\xff" * 5000, INVALID
    yield "unknown-extension", lambda: _file(b"\x21\x99\x03abc\0", _frame()), _RIGHT
    yield "unknown-block", lambda: _file(b"\x99", _frame()), SURVIVES


def _interlaced() -> bytes:
    order = [*range(0, 64, 8), *range(4, 64, 8), *range(2, 64, 4), *range(1, 64, 2)]
    return _file(gif.frame(SIZE, _coded(indices()[order]), interlaced=True))


def _script() -> bytes:
    """A file that is also JavaScript: its width is the start of a comment."""
    head = bytearray(gif.screen(*SIZE, PALETTE))
    head[6:8] = b"/*"
    return bytes(head) + _frame() + gif.TRAILER + b"*/=1;alert(1)"


def _animations() -> Group:
    small = gif.control() + gif.frame((8, 8), gif.uncompressed([1] * 64))
    yield "frames-3000", lambda: _file(gif.loop(), _frame(), small * 3000), _RIGHT
    yield (
        "loops-for-ever-without-delay",
        lambda: _file(gif.loop(0), (gif.control() + _frame()) * 5),
        _RIGHT,
    )
    yield (
        "loop-extension-broken",
        lambda: _file(b"\x21\xff\x0bNETSCAPE2.0\x01\x01\0", _frame()),
        _RIGHT,
    )
    yield (
        "second-frame-damaged",
        lambda: _file(_frame(), gif.frame(SIZE, b"\x02\xff\xff")),
        SURVIVES,
    )
    yield "second-frame-huge", lambda: _file(
        _frame(), gif.frame((65_535, 65_535), gif.uncompressed([0]))
    ), SURVIVES  # fmt: skip


def _sizes() -> Group:
    tiny = gif.frame((1, 1), gif.uncompressed([0]))
    yield "huge-screen-tiny-frame", lambda: gif.screen(65_535, 65_535, PALETTE) + tiny, TOO_LARGE
    yield "frame-larger-than-screen", _overlapping, ACCEPTED
    yield "frame-outside-the-screen", lambda: _file(gif.frame(SIZE, _lzw(), (500, 500))), SURVIVES
    yield "frame-huge", lambda: _file(gif.frame((65_535, 65_535), _lzw())), INVALID_OR_TOO_LARGE
    yield "frame-of-0x0", lambda: _file(gif.frame((0, 0), _lzw())), SURVIVES
    yield "screen-of-0x0", lambda: gif.screen(0, 0, PALETTE) + _frame() + gif.TRAILER, SURVIVES
    yield "no-frame", lambda: _file(), INVALID
    yield "screen-only", lambda: _SCREEN, INVALID


def _overlapping() -> bytes:
    return gif.screen(32, 24, PALETTE) + _frame() + gif.TRAILER


def _streams() -> Group:
    for code_size in (0, 12, 13, 255):
        lzw = bytes([code_size]) + _lzw()[1:]
        expected = SURVIVES if code_size in (0, 12) else INVALID
        yield f"code-size-{code_size}", functools.partial(_of_data, lzw), expected
    yield "code-size-1", lambda: _of_data(b"\x01" + _lzw()[1:]), SURVIVES
    yield "first-code-unknown", lambda: _of_data(b"\x02" + b"\xff" * 50), INVALID
    yield "data-of-no-bytes", lambda: _of_data(b"\x02"), INVALID
    yield (
        "end-code-at-half",
        lambda: _of_data(_coded(indices()[:30])),
        INVALID,
    )
    yield "data-cut", lambda: _file(_frame())[:1500], INVALID
    yield (
        "sub-block-too-long",
        lambda: _SCREEN + gif.frame(SIZE, b"\x02")[:-1] + b"\xff\x8c",
        INVALID,
    )
    yield (
        "clear-codes-only",
        lambda: _of_data(b"\x02" + struct.pack("<I", 0x24924924) * 5000),
        INVALID,
    )


def _of_data(lzw: bytes) -> bytes:
    return _file(gif.frame(SIZE, lzw))
