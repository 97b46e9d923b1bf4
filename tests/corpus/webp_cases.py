"""WebP: lossy, lossless, animated, and containers that contradict their contents."""

import functools
import io
import struct
from collections.abc import Callable, Iterator

from tests.corpus.cases import (
    INVALID,
    INVALID_OR_TOO_LARGE,
    SURVIVES,
    Case,
    Expectation,
    named,
    solid,
)
from tests.corpus.scenes import RED, SIZE, WHITE, circle, quadrants, upright
from tests.corpus.writers import webp
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RED_CHUNK = webp.vp8l(*SIZE, RED)
_RED = solid(RED, SIZE, 2)


def cases() -> Iterator[Case]:
    for group in (_pictures(), _animations(), _containers(), _streams()):
        for name, make, expected in group:
            yield Case(f"webp/{name}", make, expected, "image/webp")


def _pictures() -> Group:
    yield "lossy", lambda: encode(quadrants(), "WEBP", quality=95), upright(30)
    yield "lossless", lambda: encode(quadrants(), "WEBP", lossless=True), upright(2)
    yield "lossy-circle", lambda: encode(circle(), "WEBP"), named("a red circle")
    yield "of-34-bytes", lambda: webp.riff(_RED_CHUNK), _RED
    yield "fully-transparent", lambda: _alpha(0), solid(WHITE, SIZE, 2)
    yield "nearly-opaque", lambda: _alpha(254), upright(30)


def _alpha(alpha: int) -> bytes:
    image = quadrants().copy()
    image.putalpha(alpha)
    return encode(image, "WEBP", quality=95, exact=True)


def _animations() -> Group:
    frame = webp.anmf(SIZE, _RED_CHUNK)
    head = webp.vp8x(*SIZE, webp.ANIMATION) + webp.anim()
    yield "animated", _animated, upright(30)
    yield "frames-3000", lambda: webp.riff(head, frame * 3000), _RED
    yield "animated-without-frames", lambda: webp.riff(head), INVALID
    yield "frame-larger-than-canvas", lambda: webp.riff(
        head, webp.anmf((200, 200), webp.vp8l(200, 200, RED))
    ), INVALID  # fmt: skip
    yield "frame-outside-the-canvas", lambda: webp.riff(
        head, webp.anmf((16, 16), webp.vp8l(16, 16, RED), (500, 500))
    ), INVALID  # fmt: skip
    yield "frame-is-not-what-it-says", lambda: webp.riff(
        head, webp.anmf(SIZE, webp.vp8l(8, 8, RED))
    ), SURVIVES  # fmt: skip
    yield "second-frame-damaged", lambda: webp.riff(head, frame, frame[:20]), SURVIVES


def _animated() -> bytes:
    file, frames = io.BytesIO(), [quadrants().rotate(180)]
    quadrants().save(file, "WEBP", save_all=True, append_images=frames, quality=95)
    return file.getvalue()


def _containers() -> Group:
    riff = webp.riff
    yield "canvas-of-the-picture", lambda: riff(webp.vp8x(*SIZE), _RED_CHUNK), _RED
    yield "canvas-larger", lambda: riff(webp.vp8x(200, 200), _RED_CHUNK), INVALID
    yield "canvas-smaller", lambda: riff(webp.vp8x(16, 16), _RED_CHUNK), INVALID
    yield "canvas-huge", lambda: riff(webp.vp8x(1 << 24, 1 << 24), _RED_CHUNK), INVALID_OR_TOO_LARGE
    yield "canvas-tiny-picture-large", lambda: riff(
        webp.vp8x(1, 1), webp.vp8l(16_000, 16_000, RED)
    ), INVALID_OR_TOO_LARGE  # fmt: skip
    yield "two-pictures", lambda: riff(_RED_CHUNK, webp.vp8l(10_000, 10_000, RED)), SURVIVES
    yield "picture-twice-behind-canvas", lambda: riff(
        webp.vp8x(*SIZE), _RED_CHUNK, webp.vp8l(10_000, 10_000, RED)
    ), SURVIVES  # fmt: skip
    yield "no-picture", lambda: riff(), INVALID
    yield "canvas-only", lambda: riff(webp.vp8x(*SIZE)), INVALID
    yield "unknown-chunk-only", lambda: riff(webp.chunk(b"ABCD", b"x")), INVALID
    yield "unknown-chunks-20000", lambda: riff(
        webp.vp8x(*SIZE), _RED_CHUNK, webp.chunk(b"ABCD", b"xy") * 20_000
    ), _RED  # fmt: skip
    yield "metadata-announced-and-missing", lambda: riff(
        webp.vp8x(*SIZE, webp.EXIF), _RED_CHUNK
    ), SURVIVES  # fmt: skip
    yield "trailing-html", lambda: riff(_RED_CHUNK) + b"<script>1</script>", _RED
    for name, size in (("0", 0), ("of-4-gb", 0xFFFFFFFF), ("odd", 31), ("too-small", 12)):
        yield f"file-size-{name}", functools.partial(riff, _RED_CHUNK, size=size), SURVIVES
    yield "file-size-beyond-the-end", lambda: riff(_RED_CHUNK, size=5000), INVALID
    yield "chunk-size-beyond-the-end", _long_chunk, INVALID
    yield "chunk-size-of-4-gb", lambda: _long_chunk(0xFFFFFFFF), INVALID


def _long_chunk(size: int = 5000) -> bytes:
    return webp.riff(_RED_CHUNK[:4] + struct.pack("<I", size) + _RED_CHUNK[8:])


def _streams() -> Group:
    lossy = encode(quadrants(), "WEBP", quality=95)
    start = lossy.index(b"\x9d\x01\x2a")
    yield "lossy-without-start-code", lambda: lossy.replace(b"\x9d\x01\x2a", b"\0\0\0"), INVALID
    yield (
        "lossy-not-a-key-frame",
        lambda: _with_byte(lossy, start - 3, lossy[start - 3] | 1),
        INVALID,
    )
    yield "lossy-of-0x0", lambda: lossy[: start + 3] + bytes(4) + lossy[start + 7 :], INVALID
    lossless = webp.riff(_RED_CHUNK)
    yield "lossless-without-signature", lambda: _with_byte(lossless, 20, 0), INVALID
    yield "lossless-of-version-7", lambda: _with_byte(lossless, 24, lossless[24] | 0xE0), INVALID
    yield "lossless-empty", lambda: webp.riff(webp.chunk(b"VP8L", b"\x2f")), INVALID


def _with_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]
