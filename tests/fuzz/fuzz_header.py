"""Coverage-guided search for files for which the header reader and the decoders disagree.

    pip install --target /tmp/atheris atheris
    PYTHONPATH=/tmp/atheris python -m tests.fuzz.fuzz_header --seconds 60 [corpus directory]

A finding ends the run and is written to the directory as `crash-...`; given in its place, it is
tried again. Coverage is that of the reader and of Pillow's Python code. The seeds are made on
the fly; the tests of the reader take theirs from here.
"""

import argparse
import functools
import io
import resource
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, PngImagePlugin

from server.errors import ClientError
from server.imaging import header
from tests.pictures import encode

pillow_heif.register_heif_opener()

Size = tuple[int, int]

SIZE = (37, 23)
# Larger files are opened but not decoded; libwebp and libavif allocate on opening.
MAX_PIXELS = 1_000_000
MAX_FILE_BYTES = 4096
MAX_MEMORY_BYTES = 8 << 30

ORIENTATION = 274


def exif(orientation: int | None, order: str = ">") -> bytes:
    """EXIF like a camera's: the orientation, if any, among other values."""
    values = Image.Exif()
    values.endian = order
    values.update({271: "Maker of cameras", 282: 72.0, 296: 2, 305: "1.0"})
    if orientation is not None:
        values[ORIENTATION] = orientation
    return values.tobytes()


def xmp(orientation: int, element: bool = False) -> bytes:
    form = b"<tiff:Orientation>%d</tiff:Orientation>" if element else b'tiff:Orientation="%d"'
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + form % orientation + b"</x:xmpmeta>"


def profile(orientation: int) -> str:
    """EXIF as ImageMagick writes it into the text of a PNG."""
    digits = exif(orientation).hex()
    lines = [digits[i : i + 72] for i in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(digits) // 2:8}", *lines, ""])


def segment(marker: int, contents: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(contents) + 2) + contents


def chunk(kind: bytes, contents: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(contents)) + kind + contents + _checksum(kind + contents)


def _checksum(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def with_checksums(png: bytes) -> bytes:
    """`png` with the right checksum in every chunk."""
    fixed = bytearray(png)
    at = 8
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", fixed, at)
        end = at + 8 + length
        if end + 4 > len(png):
            break
        fixed[end : end + 4] = _checksum(fixed[at + 4 : end])
        at = end + 4
    return bytes(fixed)


def with_chunks_at_end(png: bytes, *chunks: bytes) -> bytes:
    return png[:-12] + b"".join(chunks) + png[-12:]


def box(kind: bytes, contents: bytes) -> bytes:
    """A box of a HEIF file."""
    return struct.pack(">I4s", len(contents) + 8, kind) + contents


def _boxes(data: bytes) -> dict[bytes, bytes]:
    found = {}
    while data:
        size, kind = struct.unpack_from(">I4s", data)
        found[kind] = data[8:size]
        data = data[size:]
    return found


def _joined(found: dict[bytes, bytes]) -> bytes:
    return b"".join(box(kind, contents) for kind, contents in found.items())


def with_properties(heif: bytes, *properties: bytes) -> bytes:
    """A HEIF file of one item, as pillow-heif or Pillow writes it, with more properties."""
    top = _boxes(heif)
    meta = _boxes(top[b"meta"][4:])
    lists = _boxes(meta[b"iprp"])
    known = len(_boxes(lists[b"ipco"]))
    ours = bytes(0x80 | known + 1 + i for i in range(len(properties)))
    ipma = bytearray(lists[b"ipma"] + ours)
    ipma[10] += len(ours)
    lists[b"ipco"] += b"".join(properties)
    lists[b"ipma"] = bytes(ipma)
    added = len(_joined(lists)) - len(meta[b"iprp"])
    meta[b"iprp"] = _joined(lists)
    iloc = bytearray(meta[b"iloc"])
    (offset,) = struct.unpack_from(">I", iloc, len(iloc) - 8)
    struct.pack_into(">I", iloc, len(iloc) - 8, offset + added)
    meta[b"iloc"] = bytes(iloc)
    top[b"meta"] = top[b"meta"][:4] + _joined(meta)
    return _joined(top)


def irot(quarters: int) -> bytes:
    return box(b"irot", bytes([quarters]))


def imir(axis: int) -> bytes:
    return box(b"imir", bytes([axis]))


def clap(width: int, height: int, right: Size = (0, 1), down: Size = (0, 1)) -> bytes:
    """A crop to `width` and `height`, offset from the centre by the given fractions."""
    return box(b"clap", struct.pack(">IIIIiIiI", width, 1, height, 1, *right, *down))


def picture(mode: str = "RGB", size: Size = SIZE) -> Image.Image:
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    colors = np.stack([rows * 7 % 256, columns * 5 % 256, (rows + columns) % 256], -1)
    return Image.fromarray(colors.astype(np.uint8)).convert(mode)


@functools.cache
def seeds() -> dict[str, bytes]:
    """Small files of every format, by names that begin with it."""
    return {**_jpeg(), **_png(), **_webp(), **_gif(), **_bmp(), **_tiff(), **_heif(), **_avif()}


def _jpeg() -> dict[str, bytes]:
    plain = encode(picture(), "JPEG")
    turned = exif(6)
    parts = segment(0xE1, turned[:30]), segment(0xE1, b"Exif\0\0" + turned[30:])
    return {
        "jpeg": plain,
        "jpeg grey": encode(picture("L"), "JPEG", xmp=xmp(5, element=True), dpi=(72, 72)),
        "jpeg cmyk": encode(picture("CMYK"), "JPEG", exif=exif(7)),
        "jpeg progressive": encode(picture(), "JPEG", progressive=True, xmp=xmp(6)),
        "jpeg little-endian exif": encode(picture(), "JPEG", exif=exif(8, "<")),
        "jpeg exif before xmp": encode(picture(), "JPEG", exif=exif(3), xmp=xmp(6)),
        "jpeg exif without orientation": encode(picture(), "JPEG", exif=exif(None), xmp=xmp(6)),
        "jpeg exif in two segments": plain[:2] + b"".join(parts) + plain[2:],
        "jpeg padded": plain[:2] + segment(0xE1, turned) + b"\0\0\0\xff\xff" + plain[2:],
        "jpeg of several": encode(
            picture(), "MPO", save_all=True, append_images=[picture(size=(9, 9))], exif=exif(6)
        ),
    }


def _png() -> dict[str, bytes]:
    def text(add: str, *arguments: Any) -> bytes:
        info = PngImagePlugin.PngInfo()
        getattr(info, add)(*arguments)
        return encode(picture(), "PNG", pnginfo=info)

    plain = encode(picture(), "PNG")
    xmp_key = "XML:com.adobe.xmp"
    more = {"save_all": True, "append_images": [picture().rotate(9)]}
    return {
        "png": plain,
        "png palette": encode(picture("P"), "PNG"),
        "png exif": encode(picture(), "PNG", exif=exif(6)),
        "png exif at the end": with_chunks_at_end(plain, chunk(b"eXIf", exif(8)[6:])),
        "png exif as text": with_chunks_at_end(plain, chunk(b"tEXt", b"exif\0" + exif(6))),
        "png profile": text("add_text", "Raw profile type exif", profile(7)),
        "png packed profile": text("add_text", "Raw profile type exif", profile(6), True),
        "png xmp": text("add_itxt", xmp_key, xmp(8)),
        "png packed xmp": text("add_itxt", xmp_key, xmp(5), "en", "key", True),
        "png animated": encode(picture(), "PNG", exif=exif(6), **more),
        "png animated behind": encode(picture(), "PNG", default_image=True, **more),
    }


def _webp() -> dict[str, bytes]:
    more = {"save_all": True, "append_images": [picture().rotate(9)]}
    return {
        "webp": encode(picture(), "WEBP"),
        "webp lossless": encode(picture(), "WEBP", lossless=True),
        "webp exif": encode(picture("RGBA"), "WEBP", exif=exif(6), xmp=xmp(3)),
        "webp xmp": encode(picture(), "WEBP", lossless=True, xmp=xmp(6)),
        "webp animated": encode(picture(), "WEBP", exif=exif(8), **more),
    }


def _gif() -> dict[str, bytes]:
    plain = encode(picture("P"), "GIF")
    more = [picture().rotate(90), picture()]
    return {
        "gif": plain,
        "gif larger than its screen": plain[:6] + struct.pack("<HH", 5, 40) + plain[10:],
        "gif without screen": plain[:6] + bytes(4) + plain[10:],
        "gif animated": encode(
            picture(), "GIF", save_all=True, append_images=more, loop=0, comment=b"hello"
        ),
    }


def _bmp() -> dict[str, bytes]:
    plain = encode(picture(), "BMP")
    width, height = SIZE
    return {
        "bmp": plain,
        "bmp palette": encode(picture("P"), "BMP"),
        "bmp from the top": plain[:22] + struct.pack("<i", -height) + plain[26:],
        "bmp of os2": b"BM"
        + struct.pack("<8xI", 26)
        + struct.pack("<IHHHH", 12, width, height, 1, 24)
        + plain[54:],
    }


def _tiff() -> dict[str, bytes]:
    turned = {ORIENTATION: 6}
    return {
        "tiff": encode(picture(), "TIFF"),
        "tiff packed": encode(picture(), "TIFF", compression="tiff_lzw", tiffinfo=turned),
        "tiff jpeg": encode(picture(), "TIFF", compression="jpeg", tiffinfo={ORIENTATION: 3}),
        "tiff big": encode(picture(), "TIFF", big_tiff=True, tiffinfo={ORIENTATION: 8}),
        "tiff big-endian": encode(Image.new("I;16B", SIZE), "TIFF", tiffinfo={ORIENTATION: 5}),
        "tiff xmp": encode(picture(), "TIFF", tiffinfo={700: xmp(6)}),
        "tiff pages": encode(
            picture(), "TIFF", save_all=True, append_images=[picture(size=(9, 9))]
        ),
    }


def _heif() -> dict[str, bytes]:
    plain = encode(picture(), "HEIF")
    return {
        "heif": plain,
        "heif exif": encode(picture(), "HEIF", exif=exif(6)),
        "heif xmp": encode(picture(), "HEIF", xmp=xmp(8)),
        "heif transparent": encode(picture("RGBA"), "HEIF"),
        "heif tiles": encode(picture(size=(130, 70)), "HEIF", tile_size=64, exif=exif(7)),
        "heif of brand mif1": plain[:8] + b"mif1" + plain[12:],
        "heif cropped": with_properties(plain, irot(3), imir(1), clap(20, 11, (1, 2), (-1, 2))),
    }


def _avif() -> dict[str, bytes]:
    plain = encode(picture(), "AVIF")
    more = {"save_all": True, "append_images": [picture().rotate(9)]}
    # Pillow would remove an orientation from the EXIF, so that its tag number is set afterwards.
    unit = struct.pack(">HHIH", 296, 3, 1, 2)
    without = encode(picture(), "AVIF", exif=exif(None), xmp=xmp(8))
    turned = without.replace(unit, struct.pack(">HHIH", ORIENTATION, 3, 1, 6))
    return {
        "avif": plain,
        "avif exif": encode(picture("RGBA"), "AVIF", exif=exif(6)),
        "avif xmp": encode(picture(), "AVIF", xmp=xmp(6)),
        "avif exif without orientation": without,
        "avif exif with orientation": turned,
        "avif turned": with_properties(plain, imir(0), irot(1), clap(20, 11)),
        "avif of brand mif1": plain[:8] + b"mif1" + plain[12:],
        "avif sequence": encode(picture(), "AVIF", xmp=xmp(6), **more),
    }


def decoded_size(data: bytes) -> Size | None:
    """Upright (width, height) of the decoded `data`; None if the decoders refuse it."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=header.FORMATS)
            image.load()
            sideways = _orientation(image) in range(5, 9)
    except Exception:  # any exception of a library for a damaged file
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = before
    width, height = image.size
    return (height, width) if sideways else (width, height)


def _orientation(image: Image.Image) -> Any:
    if image.format == "HEIF":  # libheif has applied it
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is ignored
        return 1


def header_size(data: bytes) -> Size | None:
    """Upright (width, height) from the header of `data`; None if the reader refuses it."""
    try:
        return header.read(data).size
    except ClientError:
        return None


def check(data: bytes) -> None:
    """
    Raises:
        AssertionError: the header reader and the decoders find different sizes.
    """
    found = header_size(data)
    decoded = decoded_size(data) if found else None
    assert decoded in (None, found), f"the header says {found}, decoded to {decoded}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("files", nargs="?", type=Path, help="a corpus directory, or a finding")
    arguments = parser.parse_args()

    import atheris

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for data in seeds().values():  # loads all modules to instrument
        check(data)
    for function in _functions(("server.imaging.header", "PIL.")):
        atheris.instrument_func(function)
    files = arguments.files or Path(tempfile.mkdtemp())
    options = [f"-max_total_time={arguments.seconds}", f"-max_len={MAX_FILE_BYTES}"]
    if not files.is_file():
        files.mkdir(exist_ok=True)
        options.append(f"-artifact_prefix={files}/")
        for name, data in seeds().items():
            (files / name.replace(" ", "-")).write_bytes(data)
    atheris.Setup([sys.argv[0], *options, str(files)], _try)
    atheris.Fuzz()


def _functions(modules: tuple[str, ...]) -> Iterator[FunctionType]:
    """The functions and methods of loaded modules whose names begin with one of `modules`."""
    for name, module in list(sys.modules.items()):
        if name.startswith(modules):
            classes = [owner for owner in vars(module).values() if isinstance(owner, type)]
            for owner in [module, *classes]:
                for item in list(vars(owner).values()):
                    function = item.fget if isinstance(item, property) else item
                    if isinstance(function, FunctionType) and function.__module__ == name:
                        yield function


def _try(data: bytes) -> None:
    check(data)
    if data.startswith(b"\x89PNG"):
        check(with_checksums(data))


if __name__ == "__main__":
    main()
