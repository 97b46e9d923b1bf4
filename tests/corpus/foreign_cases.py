"""Files that are not images, unsupported formats, files of two formats, and false MIME types."""

import functools
import gzip
import io
import random
import struct
import zipfile
from collections.abc import Callable, Iterator

from tests.corpus.cases import (
    BROKEN_PDF,
    INVALID,
    INVALID_OR_UNSUPPORTED,
    SURVIVES,
    UNSUPPORTED,
    Case,
    Expectation,
)
from tests.corpus.encoded import FORMATS
from tests.corpus.scenes import quadrants, upright
from tests.corpus.writers import boxes
from tests.pictures import encode

_SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"><rect fill="red"/></svg>'


def cases() -> Iterator[Case]:
    for name, data in (*_texts(), *_pictures(), *_media(), *_noise()):
        make = functools.partial(bytes, data) if isinstance(data, bytes) else data
        yield Case(f"foreign/{name}", make, UNSUPPORTED)
    for name, make, expected in _doubtful():
        yield Case(f"foreign/{name}", make, expected)
    yield from _types()


Data = bytes | Callable[[], bytes]


def _texts() -> Iterator[tuple[str, Data]]:
    yield "svg", _SVG.encode()
    yield "svg-with-declaration", b'<?xml version="1.0"?><!DOCTYPE svg>' + _SVG.encode()
    yield "svg-of-a-file", _SVG.replace("<rect", '<image href="file:///etc/passwd"/><rect').encode()
    yield "svg-packed", gzip.compress(_SVG.encode(), mtime=0)
    yield "svg-in-utf-16", _SVG.encode("utf-16")
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "xml-bomb", _xml_bomb()
    yield "json", b'{"error": {"message": "not found"}}'
    yield "plain-text", b"not an image"
    yield "xbm", b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};\n"
    yield "xpm", b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #ff0000", "a"};\n'
    yield "mvg", b"push graphic-context\nviewbox 0 0 640 480\nfill 'url(https://127.0.0.1/)'\n"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(r) file\n%%EOF\n"
    yield (
        "eps-with-preview",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, 9, 0, 0, 0, 0, 0) + b"%!PS",
    )


def _xml_bomb() -> bytes:
    levels = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "ha">{levels}]><svg>&a9;</svg>'.encode()


def _pictures() -> Iterator[tuple[str, Data]]:
    picture = quadrants()
    for kind in ("ICO", "TGA", "PCX", "PPM", "DDS", "ICNS", "SGI", "QOI", "IM", "MSP", "SPIDER"):
        yield kind.lower(), functools.partial(_by_pillow, kind)
    yield "jpeg-2000", functools.partial(encode, picture, "JPEG2000")
    yield "jpeg-2000-codestream", functools.partial(encode, picture, "JPEG2000", no_jp2=True)
    yield "jpeg-xl", b"\xff\x0a" + bytes(100)
    yield "jpeg-xl-in-boxes", boxes.box(b"JXL ", b"\r\n\x87\n") + boxes.ftyp(b"jxl ") + bytes(50)
    yield "jpeg-xr", b"II\xbc\x01" + bytes(100)
    yield "cursor", b"\0\0\2\0\1\0" + bytes(100)
    yield "pgm", b"P5 2 2 255\n\1\2\3\4"
    yield "pbm-as-text", b"P1\n2 2\n1 0 0 1\n"
    yield "pfm", b"PF\n1 1\n-1.0\n" + bytes(12)
    yield "pam", b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nENDHDR\n\1\2\3"
    yield "psd", b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 64, 96, 8, 3) + bytes(12) + bytes(999)
    yield "fits", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    yield "wmf", b"\xd7\xcd\xc6\x9a" + bytes(100)
    yield "emf", struct.pack("<II", 1, 108) + bytes(32) + b" EMF" + bytes(100)
    yield "radiance", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n\1\2\3\4"
    yield "openexr", b"\x76\x2f\x31\x01" + bytes(100)
    yield "sun-raster", struct.pack(">8I", 0x59A66A95, 1, 1, 24, 4, 1, 0, 0) + bytes(4)
    yield "bpg", b"BPG\xfb" + bytes(100)
    yield "flif", b"FLIF41" + bytes(100)
    yield "djvu", b"AT&TFORM" + bytes(4) + b"DJVU" + bytes(100)
    yield "mng", b"\x8aMNG\r\n\x1a\n" + bytes(100)
    yield "dicom", bytes(128) + b"DICM" + bytes(100)
    yield "xcf", b"gimp xcf v011\0" + bytes(100)
    yield "raw-of-olympus", b"IIRO\x08\0\0\0" + bytes(100)
    yield "raw-of-panasonic", b"IIU\0\x18\0\0\0" + bytes(100)
    yield "raw-of-canon", boxes.ftyp(b"crx ", b"crx ", b"isom") + bytes(200)
    yield "hdf5", b"\x89HDF\r\n\x1a\n" + bytes(100)


def _by_pillow(kind: str) -> bytes:
    mode = {"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    size = (32, 32) if kind == "ICNS" else (96, 64)
    return encode(quadrants(size).convert(mode), kind)


def _media() -> Iterator[tuple[str, Data]]:
    yield "mp4", boxes.ftyp(b"isom", b"isom", b"avc1") + boxes.box(b"mdat", bytes(100))
    yield "quicktime", boxes.ftyp(b"qt  ") + boxes.box(b"moov", bytes(100))
    yield "webm", b"\x1a\x45\xdf\xa3" + bytes(100)
    yield "wave", b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + bytes(90)
    yield "avi", b"RIFF" + struct.pack("<I", 100) + b"AVI LIST" + bytes(90)
    yield "mp3", b"ID3\3\0" + bytes(100)
    yield "zip", _zipped
    yield "gzip", gzip.compress(bytes(1000), mtime=0)
    yield "tar", b"picture.png".ljust(257, b"\0") + b"ustar\x0000" + bytes(255)
    yield "elf", b"\x7fELF\2\1\1" + bytes(100)
    yield "pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."
    yield "numpy", b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': ()}"


def _zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("picture.png"), encode(quadrants()))
    return file.getvalue()


def _noise() -> Iterator[tuple[str, Data]]:
    yield "one-byte", b"\xff"
    yield "newline", b"\n"
    yield "zeros", bytes(4096)
    yield "ones", b"\xff" * 4096
    yield "noise", random.Random(0).randbytes(4096)
    yield "megabyte-of-zeros", bytes(1 << 20)
    for kind in ("png", "jpeg", "webp", "tiff"):
        yield f"{kind}-behind-a-newline", functools.partial(_behind, b"\n", kind)
    yield "png-behind-html", functools.partial(_behind, b"<html>", "png")
    yield "gif-behind-zip", functools.partial(_behind, b"PK\3\4", "gif")
    yield "png-through-text-mode", lambda: FORMATS["png"](quadrants()).replace(b"\r\n", b"\n")
    yield "png-in-utf-8", lambda: FORMATS["png"](quadrants()).decode("latin-1").encode()
    yield "jpeg-as-base64-text", lambda: b"/9j/4AAQSkZJRgABAQAAAQABAAD"
    yield "data-url-as-text", b"data:image/png;base64,iVBORw0KGgo="


def _behind(head: bytes, kind: str) -> bytes:
    return head + FORMATS[kind](quadrants())


def _doubtful() -> Iterator[tuple[str, Callable[[], bytes], Expectation]]:
    yield "empty", bytes, INVALID
    yield "pdf", lambda: (
        b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    ), BROKEN_PDF  # fmt: skip
    yield "jpeg-behind-pdf", functools.partial(_behind, b"%PDF-1.4\n", "jpeg"), BROKEN_PDF
    yield "two-bytes-of-jpeg", lambda: b"\xff\xd8", INVALID_OR_UNSUPPORTED
    yield "raw-on-tiff", lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(100), INVALID_OR_UNSUPPORTED
    yield "jpeg-network-graphics", lambda: b"\x8bJNG\r\n\x1a\n" + bytes(100), UNSUPPORTED
    yield "heif-of-unknown-coder", lambda: boxes.ftyp(b"mif1", b"mif1", b"avci") + bytes(
        50
    ), INVALID_OR_UNSUPPORTED  # fmt: skip
    yield "heif-sequence", lambda: boxes.ftyp(b"hevc", b"msf1", b"hevc") + bytes(
        50
    ), INVALID_OR_UNSUPPORTED  # fmt: skip
    yield "tiff-of-text", lambda: b"II*\0 is not how one writes two", SURVIVES


def _types() -> Iterator[Case]:
    """The format is detected from the bytes, not from the data URL's type."""
    right = upright(30)
    for claimed in ("image/jpeg", "image/gif", "image/svg+xml", "image/x-unknown", "IMAGE/PNG"):
        make = functools.partial(FORMATS["png"], quadrants())
        yield Case(f"types/png-as-{claimed.replace('/', '-').lower()}", make, right, claimed)
    for kind in ("jpeg", "heic", "avif", "bmp"):
        make = functools.partial(FORMATS[kind], quadrants())
        yield Case(f"types/{kind}-as-image-png", make, right, "image/png")
    for claimed in ("image/svg+xml", "image/jpeg", "image/heic"):
        name = f"types/svg-as-{claimed.replace('/', '-')}"
        yield Case(name, _SVG.encode, UNSUPPORTED, claimed)
    yield Case("types/text-as-png", lambda: b"hello", UNSUPPORTED, "image/png")
