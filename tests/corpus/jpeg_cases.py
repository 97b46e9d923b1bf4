"""JPEG: every coding, unusual but legal files, and broken tables and markers."""

import functools
import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    INVALID_OR_TOO_LARGE,
    INVALID_OR_UNSUPPORTED,
    SURVIVES,
    Case,
    Expectation,
    named,
    solid,
)
from tests.corpus.scenes import SIZE, circle, quadrants, upright
from tests.corpus.writers import jpeg
from tests.corpus.writers.jpeg import Plane, segment
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RIGHT = upright(12)
_ADOBE_YCCK, _ADOBE_NONE = b"Adobe\0d\0\0\0\0\2", b"Adobe\0d\0\0\0\0\0"


@functools.cache
def _usual() -> bytes:
    return encode(quadrants(), "JPEG", quality=95)


def planes(mode: str, *factors: tuple[int, int], picture: Image.Image | None = None) -> list[Plane]:
    """The quadrants, or a `picture`, in `mode`, a level for each block; `factors` are (h, v) of
    each component, relative to the largest."""
    levels = np.asarray((picture or quadrants()).convert(mode))[::8, ::8]
    most_h, most_v = max(h for h, _ in factors), max(v for _, v in factors)
    return [
        Plane(levels[:: most_v // v, :: most_h // h, number], h, v)
        for number, (h, v) in enumerate(factors)
    ]


def cases() -> Iterator[Case]:
    for group in (_codings(), _components(), _segments(), _frames(), _tables(), _scans()):
        for name, make, expected in group:
            yield Case(f"jpeg/{name}", make, expected, "image/jpeg")


def _codings() -> Group:
    def pillow(**options: object) -> Callable[[], bytes]:
        return lambda: encode(quadrants(), "JPEG", quality=95, **options)

    yield "progressive", pillow(progressive=True), _RIGHT
    yield "optimized", pillow(optimize=True), _RIGHT
    yield "restart-markers", pillow(restart_marker_blocks=1), _RIGHT
    yield "subsampled-4-2-2", pillow(subsampling=1), _RIGHT
    yield "quality-1", lambda: encode(quadrants(), "JPEG", quality=1), ACCEPTED
    yield "arithmetic-coding", lambda: _of_kind(jpeg.SOF9), SURVIVES
    yield "lossless", lambda: _of_kind(jpeg.SOF3), SURVIVES
    yield "hierarchical", lambda: _of_kind(0xC5), INVALID_OR_UNSUPPORTED
    yield "jpeg-ls", lambda: _of_kind(0xF7), INVALID_OR_UNSUPPORTED
    yield "12-bit", lambda: _of_depth(12), SURVIVES
    yield "depth-1", lambda: _of_depth(1), INVALID
    yield "depth-255", lambda: _of_depth(255), INVALID


def _of_kind(kind: int) -> bytes:
    """The usual file with another frame type in its header."""
    at = next(at for marker, at, _ in jpeg.markers(_usual()) if marker == jpeg.SOF0)
    return _usual()[: at + 1] + bytes([kind]) + _usual()[at + 2 :]


def _of_depth(depth: int) -> bytes:
    flat = planes("YCbCr", (1, 1), (1, 1), (1, 1))
    frame = jpeg.sof(SIZE, [(1, 1)] * 3, bits=depth)
    return jpeg.jpeg(jpeg.tables(), frame, jpeg.sos(3), jpeg.scan(flat, SIZE))


def _components() -> Group:
    cmyk = circle().convert("CMYK")
    yield "cmyk-circle", lambda: encode(cmyk, "JPEG", quality=95), named("a red circle")
    yield "cmyk", lambda: encode(quadrants().convert("CMYK"), "JPEG", quality=95), upright(110)
    yield "ycck", _ycck, upright(110)
    yield "rgb", lambda: encode(quadrants(), "JPEG", quality=95, keep_rgb=True), _RIGHT
    yield "rgb-circle", lambda: encode(circle(), "JPEG", keep_rgb=True), named("a red circle")
    yield "grey", lambda: encode(Image.new("L", SIZE, 90), "JPEG"), solid((90,) * 3, SIZE, 4)
    for name, luma in (("4-1-1", (4, 1)), ("4-4-0", (1, 2)), ("4-1-0", (4, 2)), ("4-2-0", (2, 2))):
        yield f"flat-{name}", functools.partial(_subsampled, luma), _RIGHT
    yield "flat-restarts", lambda: _subsampled((2, 2), restart=1), _RIGHT
    yield "chroma-finer-than-luma", lambda: _flat(planes("YCbCr", (1, 1), (2, 2), (2, 2))), SURVIVES
    yield "fractional-factors", lambda: _flat(planes("YCbCr", (3, 1), (2, 1), (1, 1))), SURVIVES
    yield "one-component-of-2x2", lambda: _flat(planes("YCbCr", (2, 2))), SURVIVES
    yield "two-components", lambda: _flat(planes("YCbCr", (1, 1), (1, 1))), SURVIVES
    yield "five-components", lambda: _framed(jpeg.sof(SIZE, [(1, 1)] * 5)), INVALID
    yield "no-components", lambda: _framed(jpeg.sof(SIZE, [])), INVALID
    yield "factor-0", lambda: _framed(jpeg.sof(SIZE, [(0, 1)])), INVALID
    yield "factor-15", lambda: _framed(jpeg.sof(SIZE, [(15, 15)])), INVALID


def _flat(components: list[Plane], *before: bytes, restart: int = 0) -> bytes:
    return jpeg.baseline(SIZE, components, *before, restart=restart)


def _subsampled(luma: tuple[int, int], restart: int = 0) -> bytes:
    return _flat(planes("YCbCr", luma, (1, 1), (1, 1)), restart=restart)


def _ycck() -> bytes:
    """As Adobe writes it, with inverted inks: YCbCr encodes the inks, here the complement of the
    colours, and a K of 255 is no black."""
    none = Plane(np.full((8, 12), 255, np.uint8))
    ycc = planes("YCbCr", (1, 1), (1, 1), (1, 1), picture=ImageOps.invert(quadrants()))
    return _flat([*ycc, none], segment(jpeg.APP14, _ADOBE_YCCK))


def _framed(frame: bytes) -> bytes:
    return jpeg.jpeg(jpeg.tables(), frame, jpeg.sos(1), bytes(64))


def _segments() -> Group:
    put = functools.partial(functools.partial, _usual_with)
    for number, expected in ((300, _RIGHT), (20_000, SURVIVES)):
        yield f"comments-{number}", put(segment(jpeg.COM, b"x") * number), expected
        yield f"app-segments-{number}", put(segment(0xEF, b"x") * number), expected
    yield "app-segments-of-3-mb", put(segment(0xEF, bytes(65_000)) * 48), _RIGHT
    yield "fill-bytes-300", put(b"\xff" * 300), _RIGHT
    yield "fill-bytes-5000", put(b"\xff" * 5000), SURVIVES
    yield "segment-of-length-0", put(b"\xff\xef\0\0"), SURVIVES
    yield "segment-of-length-1", put(b"\xff\xef\0\1"), SURVIVES
    yield "noise-between-segments", put(bytes(range(1, 60))), SURVIVES
    yield "second-soi", put(jpeg.SOI), INVALID
    yield "end-before-the-frame", put(jpeg.EOI), INVALID
    yield "reserved-marker", put(segment(0x02, b"x")), SURVIVES
    yield "broken-jfif", put(segment(jpeg.APP0, b"JF")), SURVIVES
    yield "broken-adobe", put(segment(jpeg.APP14, b"Adobe")), SURVIVES
    yield "adobe-transform-99", put(segment(jpeg.APP14, _ADOBE_NONE[:-1] + b"\x63")), SURVIVES
    yield "two-pictures", _multi_picture, upright(12)
    yield (
        "multi-picture-index-broken",
        put(segment(jpeg.APP2, b"MPF\0II*\0\xff\xff\xff\xff")),
        _RIGHT,
    )
    yield "multi-picture-index-huge", put(segment(jpeg.APP2, _mpf_index())), SURVIVES
    yield "trailing-zip", lambda: _usual() + b"PK\3\4" + bytes(500), _RIGHT
    yield "no-end", lambda: _usual()[:-2], SURVIVES
    yield "soi-only", lambda: jpeg.SOI + b"\xff", INVALID_OR_UNSUPPORTED
    yield "soi-and-eoi", lambda: jpeg.SOI + jpeg.EOI, INVALID
    yield "endless-comment", lambda: jpeg.SOI + b"\xff\xfe\xff\xff" + bytes(1000), INVALID


def _usual_with(segments: bytes) -> bytes:
    return jpeg.after_soi(_usual(), segments)


def _multi_picture() -> bytes:
    file = io.BytesIO()
    other = quadrants().rotate(180)
    quadrants().save(file, "MPO", save_all=True, append_images=[other], quality=95)
    return file.getvalue()


def _mpf_index() -> bytes:
    """An index that claims 16 million pictures."""
    entries = struct.pack("<HHIIHHII", 0xB001, 4, 1, 1 << 24, 0xB002, 7, 0xFFFFFFF0, 50)
    return b"MPF\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)


def _frames() -> Group:
    second = jpeg.sof((20_000, 20_000), [(1, 1)])
    yield "two-frames", lambda: _before_scan(jpeg.sof(SIZE, [(1, 1)] * 3)), INVALID
    yield "second-frame-larger", lambda: _before_scan(second), INVALID_OR_TOO_LARGE
    yield "height-0", lambda: jpeg.patched_size(_usual(), (96, 0)), INVALID
    yield "height-in-dnl", _defined_later, SURVIVES
    yield "width-0", lambda: jpeg.patched_size(_usual(), (0, 64)), INVALID
    yield "no-frame", lambda: jpeg.without(_usual(), jpeg.SOF0), INVALID
    yield "no-scan", lambda: jpeg.jpeg(jpeg.tables(), jpeg.sof(SIZE, [(1, 1)])), INVALID
    yield "taller-than-its-data", lambda: jpeg.patched_size(_usual(), (96, 640)), INVALID
    yield "frame-behind-the-scan", _frame_last, INVALID


def _before_scan(frame: bytes) -> bytes:
    at = next(at for marker, at, _ in jpeg.markers(_usual()) if marker == jpeg.SOS)
    return _usual()[:at] + frame + _usual()[at:]


def _defined_later() -> bytes:
    levels = planes("YCbCr", (1, 1))
    frame = jpeg.sof((SIZE[0], 0), [(1, 1)])
    later = segment(jpeg.DNL, struct.pack(">H", SIZE[1]))
    return jpeg.jpeg(jpeg.tables(), frame, jpeg.sos(1), jpeg.scan(levels, SIZE), later)


def _frame_last() -> bytes:
    frame = jpeg.sof(SIZE, [(1, 1)])
    levels = planes("YCbCr", (1, 1))
    return jpeg.jpeg(jpeg.tables(), jpeg.sos(1), jpeg.scan(levels, SIZE), frame)


def _tables() -> Group:
    put = functools.partial(functools.partial, _usual_with)
    yield "no-quantization", lambda: jpeg.without(_usual(), jpeg.DQT), INVALID
    yield "no-huffman-tables", lambda: jpeg.without(_usual(), jpeg.DHT), SURVIVES
    yield "huffman-table-overfull", put(segment(jpeg.DHT, b"\0" + bytes([255] * 16))), INVALID
    yield "huffman-table-contradictory", put(_contradictory_codes()), SURVIVES
    yield "quantization-by-65535", _coarse, SURVIVES
    yield "quantization-by-0", lambda: _requantized(b"\0" + bytes(64)), SURVIVES
    yield "quantization-cut", put(segment(jpeg.DQT, b"\0" + bytes(10))), INVALID
    yield "restart-interval-1-without-markers", _no_markers, INVALID
    yield "restart-markers-out-of-order", _shuffled_restarts, SURVIVES


def _contradictory_codes() -> bytes:
    """Three codes of one bit."""
    return segment(jpeg.DHT, b"\x00" + bytes([3, *[0] * 15]) + b"\0\1\2")


def _requantized(table: bytes) -> bytes:
    return jpeg.after_soi(jpeg.without(_usual(), jpeg.DQT), segment(jpeg.DQT, table), segment(
        jpeg.DQT, bytes([table[0] | 1]) + table[1:]
    ))  # fmt: skip


def _coarse() -> bytes:
    return _requantized(b"\x10" + b"\xff" * 128)


def _no_markers() -> bytes:
    return _usual_with(segment(jpeg.DRI, b"\0\1"))


def _shuffled_restarts() -> bytes:
    data = _subsampled((2, 2), restart=1)
    return data.replace(b"\xff\xd1", b"\xff\xd6")


def _scans() -> Group:
    """Legal progressive files of many scans; each scan costs time for every block. Encoders write
    about ten scans, so that hundreds need not be decoded if that takes many seconds."""
    yield "883-scans", lambda: jpeg.many_scans((1000, 1000), 883), SURVIVES
    yield "883-scans-of-16-megapixels", lambda: jpeg.many_scans((4000, 4000), 883), SURVIVES
    yield "883-scans-of-100-megapixels", lambda: jpeg.many_scans((10_000, 10_000), 883), INVALID
    yield "480-scans-of-100-megapixels", lambda: jpeg.many_scans((10_000, 10_000), 480), INVALID
    yield "20-scans-of-16-megapixels", lambda: jpeg.many_scans((4000, 4000), 20), SURVIVES
    yield "scan-of-an-unknown-component", lambda: _framed_scan(b"\1\7\0\0\x3f\0"), INVALID
    yield (
        "scan-of-five-components",
        lambda: _framed_scan(b"\5" + b"\1\0" * 5 + b"\0\x3f\0"),
        INVALID,
    )
    yield "scan-of-bad-spectrum", lambda: _framed_scan(b"\1\1\0\x3f\x05\xee"), SURVIVES


def _framed_scan(head: bytes) -> bytes:
    frame = jpeg.sof(SIZE, [(1, 1)])
    return jpeg.jpeg(jpeg.tables(), frame, segment(jpeg.SOS, head), bytes(64))
