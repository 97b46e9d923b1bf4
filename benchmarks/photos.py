"""Seeded pictures that load an image server as real ones do: photos and pages of text.

A photo has the statistics that determine the cost of a codec: an amplitude spectrum that falls as
1/f, edges between objects, correlated colour channels, mild sensor noise. At quality 88
and 4:2:0, 12 megapixels take 4 to 5 MB, like photos of a phone.

Drawing is slow, so only a few base pictures are drawn. `stamp` makes copies distinct: a comment in
the file changes its bytes, but not its pixels, so that caches by content treat it as new.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Plane = NDArray[np.float32]

_TEXT = (
    "the of and to in for is on that by this with from at as it are be was or an which "
    "invoice total amount payment contract section schedule delivery notice party agreement "
    "measurement analysis result average between temperature pressure sample method figure "
    "however therefore approximately following previous quarterly revenue estimate report"
)
WORDS = _TEXT.split()


# Space for the stamp of a WebP file, whose format has no comments.
_UNSTAMPED = "benchmark picture " + 16 * "0"


def photo(width: int, height: int, seed: int, quality: int = 88, kind: str = "JPEG") -> bytes:
    """Return a file with the statistics of a camera's picture: JPEG (4:2:0), WebP or PNG.

    `quality` is JPEG's. WebP gets a lower value: its usual 80 corresponds to JPEG's 88.
    """
    rng = np.random.default_rng(seed)
    luma = _luma(width, height, rng)
    red, blue = (_fractal(width, height, rng, 1.4) * 8 for _ in range(2))
    planes = [luma + red, luma - 0.4 * red - 0.3 * blue, luma + blue]
    pixels = np.stack([_exposed(plane, rng) for plane in planes], axis=-1)
    image, file = Image.fromarray(pixels), io.BytesIO()
    options: dict[str, dict[str, object]] = {
        "JPEG": {"quality": quality, "subsampling": "4:2:0"},
        "WEBP": {"quality": quality - 8, "xmp": _UNSTAMPED.encode()},
        "PNG": {},
    }
    image.save(file, kind, **options[kind])
    return file.getvalue()


def page(width: int, height: int, seed: int) -> bytes:
    """Return a PNG file that shows a page of black text with a heading and a ruled table."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    margin, size = width // 11, width // 60
    draw.text((margin, margin), _sentence(rng, 5).title(), "black", _font(size * 2))
    bottom = _paragraphs(draw, rng, (margin, margin + size * 4, width - margin, height * 0.7), size)
    _table(draw, rng, (margin, bottom + size, width - margin, height - margin), size)
    return _png(image)


def stamp(picture: bytes, mark: str) -> bytes:
    """Return the same picture as another file, with `mark` as a comment after its header.

    In a WebP file the mark replaces a placeholder of equal length, which `photo` writes.
    """
    if picture.startswith(b"RIFF"):
        assert len(mark) == len(_UNSTAMPED)
        return picture.replace(_UNSTAMPED.encode(), mark.encode("ascii"))
    if picture.startswith(b"\xff\xd8"):
        comment = b"\xff\xfe" + struct.pack(">H", len(mark) + 2) + mark.encode("ascii")
        return picture[:2] + comment + picture[2:]
    header_end = 8 + 25  # the signature and the IHDR chunk
    chunk = b"tEXtComment\0" + mark.encode("ascii")
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return picture[:header_end] + framed + picture[header_end:]


def _fractal(width: int, height: int, rng: np.random.Generator, power: float) -> Plane:
    """Return a field of variance one whose amplitude falls with frequency as 1/f**power."""
    down = np.fft.fftfreq(height).astype(np.float32)[:, None]
    across = np.fft.rfftfreq(width).astype(np.float32)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1.0
    phase = rng.random(frequency.shape, dtype=np.float32) * np.float32(2 * np.pi)
    spectrum = np.exp(1j * phase) / frequency**power
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray(field / field.std(), dtype=np.float32)


def _luma(width: int, height: int, rng: np.random.Generator) -> Plane:
    """Return brightness: textured surfaces, separated by the outlines of objects."""
    texture = _fractal(width, height, rng, 1.0)
    surface = np.asarray(_objects(width, height, rng), dtype=np.float32)
    contrast = 14 + 20 * (surface / 255)  # surfaces are smooth or rough
    return np.asarray(0.55 * surface + 55 + contrast * texture, dtype=np.float32)


def _objects(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return overlapping shapes, large ones below, with edges as soft as a lens renders them."""
    image = Image.new("L", (width, height), 128)
    draw = ImageDraw.Draw(image)
    for size in np.sort(rng.pareto(1.5, 160) + 1)[::-1] * width / 80:
        x, y = rng.random(2) * (width, height)
        reach = np.minimum(rng.uniform(0.4, 1.6, 2) * size, width / 3)
        box = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
        shade = int(rng.integers(20, 236))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=shade)
    return image.filter(ImageFilter.GaussianBlur(1.2))


def _exposed(plane: Plane, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the plane as a sensor records it: with noise, clipped to eight bits."""
    noise = rng.standard_normal(plane.shape, dtype=np.float32)
    noise += np.roll(noise, 1, axis=1)  # demosaicing makes neighbours alike
    return np.clip(plane + noise * 2.2, 0, 255).astype(np.uint8)


def _paragraphs(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    size: int,
) -> float:
    """Fill the box with lines of words, some paragraphs apart; return where the text ends."""
    left, y, right, bottom = box
    font = _font(size)
    while y < bottom:
        ends_paragraph = rng.random() < 0.15
        line, share = "", rng.uniform(0.3, 0.9) if ends_paragraph else 1.0
        while font.getlength(line) < (right - left) * share - 4 * size:
            line += _sentence(rng, 1) + " "
        draw.text((left, y), line, "black", font)
        y += size * (2.6 if ends_paragraph else 1.5)
    return y


def _table(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    size: int,
) -> None:
    left, top, right, bottom = box
    rows, columns = int((bottom - top) // (size * 2)), 5
    for row in range(rows):
        y = top + row * size * 2
        draw.line((left, y, right, y), fill="gray", width=2)
        for column in range(columns):
            value = f"{rng.random() * 10**column:,.2f}" if column else _sentence(rng, 1)
            x = left + (right - left) * column / columns
            draw.text((x + 6, y + size // 3), value, "black", _font(size))


def _sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), words))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
