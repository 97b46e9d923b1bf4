"""Metadata: EXIF, XMP and colour profiles, valid and hostile."""

import functools
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

from tests.corpus.cases import ACCEPTED, SURVIVES, Case, Expectation, named
from tests.corpus.encoded import FORMATS, MIMES, heic
from tests.corpus.scenes import circle, quadrants, stored, upright
from tests.corpus.writers import icc, jpeg, png, tiff
from tests.corpus.writers.tiff import ASCII, BYTE, LONG, SHORT, UNDEFINED, Tag
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RIGHT = upright(30)
_EXIF_MARK = b"Exif\0\0"


def cases() -> Iterator[Case]:
    for group in (_orientations(), _exif(), _same_name(), _profiles()):
        for name, make, expected in group:
            kind = name.partition("/")[0]
            yield Case(name, make, expected, MIMES[kind])


def with_exif(data: bytes, block: bytes) -> bytes:
    """A JPEG with the EXIF block `block`."""
    return jpeg.after_soi(data, jpeg.segment(jpeg.APP1, _EXIF_MARK + block))


def _jpeg(orientation: int = 1) -> bytes:
    return FORMATS["jpeg"](stored(orientation))


def _orientations() -> Group:
    for orientation in range(1, 9):
        yield f"jpeg/orientation-{orientation}", functools.partial(_oriented, orientation), _RIGHT
    for odd in (0, 9, 255, 65_535):
        make = functools.partial(_says, Tag(tiff.ORIENTATION, SHORT, [odd]))
        yield f"jpeg/orientation-{odd}", make, _RIGHT
    big_endian = tiff.exif(Tag(tiff.ORIENTATION, SHORT, [6]), layout=tiff.Layout(">"))
    yield "jpeg/orientation-big-endian", lambda: with_exif(_jpeg(6), big_endian), _RIGHT
    long_value, text = Tag(tiff.ORIENTATION, LONG, [1]), Tag(tiff.ORIENTATION, ASCII, b"6\0")
    yield "jpeg/orientation-as-long", lambda: _says(long_value), _RIGHT
    yield "jpeg/orientation-as-text", lambda: _says(text), ACCEPTED
    eight = Tag(tiff.ORIENTATION, SHORT, [6] * 8)
    yield "jpeg/orientation-of-eight-values", lambda: _says(eight), ACCEPTED
    for orientation in (3, 5, 6, 8):
        for kind in ("png", "webp", "tiff"):
            make = functools.partial(_oriented_as, kind, orientation)
            yield f"{kind}/orientation-{orientation}", make, _RIGHT
    yield "heic/orientation-6", lambda: _heic_oriented(6), _RIGHT
    yield "heic/orientation-8", lambda: _heic_oriented(8), _RIGHT
    yield "jpeg/orientation-in-xmp", lambda: _with_xmp(_jpeg(), 6), ACCEPTED
    yield "jpeg/orientation-in-both", lambda: _with_xmp(_oriented(6), 3), _RIGHT


def _oriented(orientation: int) -> bytes:
    return with_exif(_jpeg(orientation), tiff.oriented(orientation))


def _says(*tags: Tag) -> bytes:
    """The upright JPEG with other EXIF tags."""
    return with_exif(_jpeg(), tiff.exif(*tags))


def _oriented_as(kind: str, orientation: int) -> bytes:
    picture, block = stored(orientation), tiff.oriented(orientation)
    if kind == "tiff":
        tag = Tag(tiff.ORIENTATION, SHORT, [orientation])
        return tiff.tiff(picture.size, [picture.tobytes()], (8, 8, 8), tiff.RGB, tag)
    if kind == "png":
        head, rest = png.SIGNATURE, encode(picture)[8:]
        return head + rest[:25] + png.chunk(b"eXIf", block) + rest[25:]
    return encode(picture, "WEBP", lossless=True, exif=block)


def _heic_oriented(orientation: int) -> bytes:
    """As phones write it: rotated by `irot`; the EXIF orientation must not be applied again."""
    return heic(stored(orientation), exif=_EXIF_MARK + tiff.oriented(orientation))


def _with_xmp(data: bytes, orientation: int) -> bytes:
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    )
    mark = b"http://ns.adobe.com/xap/1.0/\0"
    return jpeg.after_soi(data, jpeg.segment(jpeg.APP1, mark + packet.encode()))


def _exif() -> Group:
    one = Tag(tiff.ORIENTATION, SHORT, [1])
    blocks = {
        "empty": b"",
        "of-noise": bytes(range(7, 250)),
        "directory-at-4-gb": b"II*\0\xff\xff\xff\xff",
        "follows-itself": tiff.LITTLE.header(8) + tiff.LITTLE.ifd([one], 8, next_ifd=8),
        "sub-directory-is-itself": tiff.exif(one, Tag(tiff.EXIF_IFD, LONG, [8])),
        "tags-65535-announced": tiff.LITTLE.header(8) + b"\xff\xff" + bytes(50),
        "count-of-4-billion": tiff.exif(one, Tag(271, ASCII, b"", 0xFFFFFFFF, 8)),
        "value-beyond-the-end": tiff.exif(one, Tag(271, ASCII, b"", 100, 1 << 30)),
        "type-unknown": tiff.exif(one, Tag(271, 99, b"abcd")),
        "maker-note-of-60-kb": tiff.exif(one, Tag(tiff.MAKER_NOTE, UNDEFINED, bytes(60_000))),
        "tags-3000": tiff.exif(one, *(Tag(40_000 + n, BYTE, b"x") for n in range(3000))),
        "thumbnail-bomb": _with_thumbnail(_huge_thumbnail()),
        "thumbnail-beyond-the-end": _with_thumbnail(b"", length=1 << 30),
        "thumbnail-of-another-picture": _with_thumbnail(encode(circle("blue"), "JPEG")),
    }
    for name, block in blocks.items():
        yield f"jpeg/exif-{name}", functools.partial(_jpeg_with, block), _RIGHT
        if name in ("follows-itself", "count-of-4-billion", "of-noise", "sub-directory-is-itself"):
            yield f"png/exif-{name}", functools.partial(_png_with, b"eXIf", block), _RIGHT
            make = functools.partial(encode, quadrants(), "WEBP", lossless=True, exif=block)
            yield f"webp/exif-{name}", make, _RIGHT
    yield "jpeg/exif-twice", lambda: with_exif(_oriented(6), tiff.oriented(3)), ACCEPTED
    yield "jpeg/xmp-broken", lambda: _with_xmp(_jpeg(), 6).replace(b"</rdf:RDF>", b""), ACCEPTED
    yield "jpeg/xmp-entities", lambda: _xmp_bomb(), _RIGHT
    yield "png/xmp-broken", lambda: _png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:"), _RIGHT


def _jpeg_with(block: bytes) -> bytes:
    return with_exif(_jpeg(), block)


def _png_with(kind: bytes, data: bytes) -> bytes:
    right = FORMATS["png"](quadrants())
    return right[:33] + png.chunk(kind, data) + right[33:]


def _huge_thumbnail() -> bytes:
    size = (65_000, 65_000)
    return jpeg.jpeg(jpeg.tables(), jpeg.sof(size, [(1, 1)]), jpeg.sos(1), bytes(2000))


def _with_thumbnail(data: bytes, length: int | None = None) -> bytes:
    """An EXIF block whose second directory has `data` as its thumbnail."""
    one = [Tag(tiff.ORIENTATION, SHORT, [1])]
    said = len(data) if length is None else length

    def block(at: int) -> bytes:
        where = [Tag(tiff.THUMBNAIL, LONG, [at]), Tag(tiff.THUMBNAIL_BYTES, LONG, [said])]
        return tiff.exif(*one, thumbnail=[Tag(tiff.COMPRESSION, SHORT, [6]), *where])

    return block(len(block(0))) + data


def _xmp_bomb() -> bytes:
    entities = '<!DOCTYPE x [<!ENTITY a0 "ha">' + "".join(
        f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)
    )
    mark = b"http://ns.adobe.com/xap/1.0/\0"
    packet = mark + (entities + "]><x:xmpmeta>&a11;</x:xmpmeta>").encode()
    return jpeg.after_soi(_jpeg(), jpeg.segment(jpeg.APP1, packet))


def _same_name() -> Group:
    """Two pictures with the same identifier."""
    uuid = b"123e4567-e89b-12d3-a456-426614174000\0"
    blocks = {
        "image-id": tiff.exif(Tag(tiff.IMAGE_ID, ASCII, uuid)),
        "unique-id": _in_sub_directory(Tag(tiff.IMAGE_UNIQUE_ID, ASCII, uuid[:33])),
    }
    for color in ("red", "blue"):
        for what, block in blocks.items():
            make = functools.partial(_named_circle, color, block)
            yield f"jpeg/same-{what}-{color}", make, named(f"a {color} circle")


def _in_sub_directory(tag: Tag) -> bytes:
    """An EXIF block with `tag` in the EXIF sub-directory."""
    length = len(tiff.exif(Tag(tiff.EXIF_IFD, LONG, [0])))
    return tiff.exif(Tag(tiff.EXIF_IFD, LONG, [length])) + tiff.LITTLE.ifd([tag], length)


def _named_circle(color: str, block: bytes) -> bytes:
    return with_exif(encode(circle(color), "JPEG", quality=95), block)


def _profiles() -> Group:
    p3, large = icc.profile(), icc.profile(padding=4_000_000)
    red = named("a red circle")
    yield "jpeg/profile-p3", lambda: _with_profile(encode(circle(), "JPEG"), p3), red
    yield "jpeg/profile-of-4-mb", lambda: _with_profile(encode(circle(), "JPEG"), large), red
    yield "jpeg/profile-of-noise", lambda: _with_profile(_jpeg(), bytes(range(256)) * 4), _RIGHT
    yield "jpeg/profile-in-missing-parts", lambda: _with_profile(_jpeg(), p3, parts=9), _RIGHT
    yield (
        "jpeg/profile-size-of-4-gb",
        lambda: _with_profile(_jpeg(), b"\xff" * 4 + p3[4:]),
        ACCEPTED,
    )
    yield "png/profile-p3", lambda: encode(circle(), icc_profile=p3), red
    yield "png/profile-of-4-mb", lambda: encode(circle(), icc_profile=large), red
    yield "png/profile-of-noise", lambda: encode(quadrants(), icc_profile=bytes(900)), SURVIVES
    yield "png/profile-cut", lambda: _png_with(b"iCCP", b"p\0\0" + zlib.compress(p3)[:90]), SURVIVES
    yield "webp/profile-p3", lambda: encode(circle(), "WEBP", icc_profile=p3), red
    yield "webp/profile-of-noise", lambda: encode(circle(), "WEBP", icc_profile=bytes(900)), red
    yield "tiff/profile-of-noise", lambda: encode(circle(), "TIFF", icc_profile=bytes(900)), red
    yield "avif/profile-p3", lambda: FORMATS["avif"](_tagged_circle(p3)), red
    yield "heic/profile-p3", lambda: FORMATS["heic"](_tagged_circle(p3)), red


def _with_profile(data: bytes, profile: bytes, parts: int | None = None) -> bytes:
    """The profile in as many segments as it needs; they declare `parts` segments."""
    pieces = [profile[at : at + 65_000] for at in range(0, len(profile), 65_000)]
    count = len(pieces) if parts is None else parts
    heads = (b"ICC_PROFILE\0" + struct.pack("BB", n + 1, count) for n in range(len(pieces)))
    segments = (head + piece for head, piece in zip(heads, pieces, strict=True))
    return jpeg.after_soi(data, *(jpeg.segment(jpeg.APP2, part) for part in segments))


def _tagged_circle(profile: bytes) -> Image.Image:
    image = circle().copy()
    image.info["icc_profile"] = profile
    return image
