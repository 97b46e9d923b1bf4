"""Expands one file into several images: the pages of a PDF, the frames of an animation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from server.concurrency import all_or_none, copied, in_thread
from server.errors import ImageFrameMissing, InvalidFile, TooManyImages
from server.imaging.encoded import EncodedImage, check_bytes, check_size, digest, encoded
from server.imaging.header import ImageHeader
from server.request.media import MediaLimits, MediaRef
from server.telemetry.record import Record

_PDF_MAGIC = b"%PDF-"
# Other bytes may precede the header of a PDF; readers look for it in this many bytes.
_PDF_HEAD_BYTES = 1024
_POINTS_PER_INCH = 72


class Inspector(Protocol):
    """Inspects files. The image pool implements it, in its workers."""

    async def inspect_pdf(
        self, data: bytes, max_pages: int, record: Record
    ) -> tuple[Sequence[tuple[float, float]], int]:
        """(width, height) in points of each of the first `max_pages` pages, and the number of all
        pages."""
        ...

    async def pdf_text(self, data: bytes, page: int, most: int, record: Record) -> str:
        """The text of page `page` (from 0) of a PDF, of at most `most` characters."""
        ...

    async def count_frames(self, data: bytes, record: Record) -> int:
        """The number of frames of an animation."""
        ...


def is_pdf(data: bytes) -> bool:
    """Whether a file is a PDF, by its first bytes."""
    return _PDF_MAGIC in data[:_PDF_HEAD_BYTES]


class Expander:
    """Turns a file into the images that a part asks for."""

    def __init__(
        self,
        inspector: Inspector,
        limits: MediaLimits,
        plain: Callable[[str], str] = lambda text: text,
    ) -> None:
        """`plain` takes what would be more than text to the model out of a page's text."""
        self._inspector = inspector
        self._limits = limits
        self._plain = plain

    async def check_upload(self, view: memoryview, record: Record) -> None:
        """Check a file before it is stored, by the rules for images and PDFs.

        Raises:
            ClientError: a request with this file would be refused too.
        """
        check_bytes(len(view), self._limits.image)
        data = await in_thread(copied, view)
        if is_pdf(data):
            await self._inspector.inspect_pdf(data, 1, record)
        else:
            await in_thread(encoded, data, self._limits.image)

    # ------------------------------------------------------------------ frames

    async def frames(
        self, image: EncodedImage, ref: MediaRef, record: Record
    ) -> list[EncodedImage]:
        """The frames of `image` that `ref` selects; by default the first.

        Raises:
            InvalidFile: `ref` asks for pages.
            TooManyImages: more frames than the limit.
        """
        wanted = ref.frames
        if ref.kind == "file" and wanted is not None:
            raise InvalidFile("the file is an image and has no pages")
        if isinstance(wanted, int):
            wanted = await self._spread(image, wanted, record)
        if wanted is None:
            return [replace(image, options=ref.options, path=ref.path)]
        if len(wanted) > self._limits.max_frames:
            raise _too_many("frames", self._limits.max_frames)
        return [self._at(image, ref, frame) for frame in wanted]

    async def _spread(self, image: EncodedImage, wanted: int, record: Record) -> tuple[int, ...]:
        """The numbers of `wanted` evenly spaced frames, including the first and the last; of all
        frames if there are fewer."""
        if wanted > self._limits.max_frames:
            raise _too_many("frames", self._limits.max_frames)
        if not image.header.animated or wanted == 1:
            return (0,)
        count = await self._inspector.count_frames(image.data, record)
        return _evenly(count, wanted)

    # ------------------------------------------------------------------ pages

    async def pages(self, data: bytes, ref: MediaRef, record: Record) -> list[EncodedImage]:
        """The pages of a PDF that `ref` selects; by default all.

        Raises:
            InvalidFile: the PDF is damaged or encrypted.
            TooManyImages: more pages than the limit.
            ImageFrameMissing: a selected page does not exist.
        """
        most, wanted = self._limits.max_pages, ref.frames
        check_bytes(len(data), self._limits.image)
        if wanted is not None and (wanted if isinstance(wanted, int) else len(wanted)) > most:
            raise _too_many("pages", most)
        if ref.uuid is not None:
            raise InvalidFile("a PDF cannot have a uuid, which names a single image")
        name = await in_thread(digest, data)
        if isinstance(wanted, int):
            _, count = await self._inspector.inspect_pdf(data, 1, record)
            wanted = _evenly(count, wanted)
        first = max(wanted, default=0) + 1 if wanted is not None else most
        sizes, count = await self._inspector.inspect_pdf(data, first, record)
        if wanted is None and count > most:
            raise TooManyImages(
                f"the file has {count} pages, the limit is {most}; select some with `pages`"
            )
        if wanted is None:
            wanted = tuple(range(count))
        if missing := [page for page in wanted if page >= count]:
            raise ImageFrameMissing(
                f"page {missing[0] + 1} does not exist; the file has {count} pages"
            )
        return [
            self._at(EncodedImage(data, name, self._page_header(sizes[page])), ref, page)
            for page in wanted
        ]

    async def texts(self, images: Sequence[EncodedImage], record: Record) -> dict[int, str]:
        """The text of each page in `images`, of one PDF, that has one, with the number of the page
        before it."""
        data, most = images[0].data, self._limits.max_page_characters
        pages = list(dict.fromkeys(image.options.frame for image in images))
        read = self._inspector.pdf_text
        found = await all_or_none([read(data, page, most, record) for page in pages])
        return {
            page: f"Text of page {page + 1}:\n{self._plain(text)}\n"
            for page, text in zip(pages, found, strict=True)
            if text
        }

    def _page_header(self, points: tuple[float, float]) -> ImageHeader:
        """The header of a page of this size in points, at the resolution for PDFs, or at a lower
        one if the limits require it."""
        limits, (width, height) = self._limits.image, points
        scale = min(
            self._limits.pdf_dpi / _POINTS_PER_INCH,
            math.sqrt(limits.max_pixels / (width * height)),
            limits.max_side / max(width, height),
        )
        size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        check_size(size, limits)
        return ImageHeader("PDF", *size, orientation=1, animated=False)

    def _at(self, image: EncodedImage, ref: MediaRef, frame: int) -> EncodedImage:
        return replace(image, options=replace(ref.options, frame=frame), path=ref.path)


def _evenly(count: int, wanted: int) -> tuple[int, ...]:
    if count <= wanted:
        return tuple(range(count))
    if wanted == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (wanted - 1)) for i in range(wanted))


def _too_many(what: str, limit: int) -> TooManyImages:
    # The requested number is not in the message: it may have thousands of digits.
    return TooManyImages(f"the part asks for more than {limit} {what}, which is the limit")
