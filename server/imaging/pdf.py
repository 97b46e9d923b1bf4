"""PDF files, read with PDFium: page count, page sizes, rendering and text.

Used in image workers only: PDFium is a large parser that runs on untrusted bytes.
"""

import math
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from server.errors import ImageFrameMissing, InvalidFile
from server.imaging.convert import ArrayImage
from server.imaging.sizing import Size

if TYPE_CHECKING:
    import pypdfium2

# Characters that PDFium returns for places without one, such as U+FFFE for a hyphen, among them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
# The least side of a page, in points. PDFium assumes US Letter if a page has no size.
_MIN_POINTS = 1.0
# A narrow page may need more pixels than asked for to be wide enough: up to four times as many, or
# these.
_SPARE_PIXELS, _SPARE_SIDE = 16_000_000, 8192


def page_sizes(data: bytes, most: int) -> tuple[list[tuple[float, float]], int]:
    """Upright (width, height) in points (1/72 inch) of each of the first `most` pages, and the
    number of all pages.

    Raises:
        InvalidFile: the PDF is damaged or encrypted, or has no pages.
    """
    with _opened(data) as document, _translated():
        count = len(document)
        if count == 0:
            raise InvalidFile("the PDF has no pages")
        sizes = [_size(document.get_page_size(page)) for page in range(min(most, count))]
        return sizes, count


def render(data: bytes, page: int, size: Size) -> Image.Image:
    """Render page `page` (from 0) on white as RGB, at the smallest scale that covers `size`,
    (width, height) in pixels. A page whose shape is far from that of `size` may get less.

    Raises:
        InvalidFile: the PDF is damaged or encrypted, or the page has no valid size.
        ImageFrameMissing: the PDF has fewer pages.
    """
    with _opened(data) as document:
        if page >= len(document):
            raise ImageFrameMissing(f"the file has {len(document)} pages, and no page {page + 1}")
        with _translated(), closing(document[page]) as shown:
            points = shown.get_size()
            if min(points) <= 0:  # its crop box lies beside its media box
                return Image.new("RGB", size, "white")
            scale = _scale(_size(points), size)
            return ArrayImage(shown.render(scale=scale, rev_byteorder=True).to_numpy())


def text(data: bytes, page: int, most: int) -> str:
    """The text layer of page `page` (from 0), at most `most` characters, without control characters
    but line breaks and tabs; "" if it has none. Raises as `render` does."""
    with _opened(data) as document:
        if page >= len(document):
            raise ImageFrameMissing(f"the file has {len(document)} pages, and no page {page + 1}")
        with (
            _translated(),
            closing(document[page]) as shown,
            closing(shown.get_textpage()) as layer,
        ):
            found: str = layer.get_text_bounded()
    lines = _CONTROLS.sub("", found[: 2 * most].replace("\r\n", "\n")).strip()
    return lines[:most]


def _scale(points: tuple[float, float], size: Size) -> float:
    """Pixels for each point."""
    width, height = points
    covering = max(size[0] / width, size[1] / height)
    most_pixels, longest = max(_SPARE_PIXELS, 4 * size[0] * size[1]), 4 * max(*size, _SPARE_SIDE)
    return min(covering, math.sqrt(most_pixels / (width * height)), longest / max(width, height))


def _size(points: tuple[float, float]) -> tuple[float, float]:
    width, height = points
    if not all(math.isfinite(side) for side in points):
        raise InvalidFile("a page of the PDF has an invalid size")
    return max(width, _MIN_POINTS), max(height, _MIN_POINTS)


@contextmanager
def _opened(data: bytes) -> Iterator["pypdfium2.PdfDocument"]:
    import pypdfium2  # here, because the server itself never opens a PDF

    with _translated():
        document: Any = pypdfium2.PdfDocument(data)
        document.init_forms()
    with closing(document):
        yield document


@contextmanager
def _translated() -> Iterator[None]:
    import pypdfium2

    try:
        yield
    except pypdfium2.PdfiumError as error:
        encrypted = "password" in str(error).lower()
        why = "is encrypted" if encrypted else "is damaged and cannot be read"
        raise InvalidFile(f"the PDF {why}") from error
