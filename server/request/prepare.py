"""Reads what a request wants of its images, and turns files and animations into images.

    body without payloads -> parts -> options into URLs, budget into the request
                                   -> a PDF or an animation: load, inspect, one image a page

It happens before the request is parsed by its route, which then sees images only.
"""

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.errors import ClientError, ImageFrameMissing, InvalidFile, SaccadeError, TooManyImages
from server.imaging.encoded import EncodedImage, ImageOptions, digest, encoded
from server.imaging.header import ImageHeader
from server.imaging.limits import Limits, check_bytes, check_size
from server.ingest.load import ImageLoader, in_thread
from server.request import parts, tenant
from server.request.image_request import ImageRequest
from server.request.parts import Part, Wish
from server.request.payloads import TakenOut
from server.telemetry import metrics, record
from server.telemetry.stages import Timeline

_PDF_MAGIC = b"%PDF-"
# A PDF may begin with other bytes; readers look for its head this far.
_PDF_HEAD_BYTES = 1024
_POINTS_PER_INCH = 72
_LARGE_DOCUMENT_BYTES = 64 * 1024


class Inspector(Protocol):
    """Looks into files without decoding them; implemented by `workers.pool.ImagePool`."""

    async def inspect_pdf(
        self, data: bytes, max_pages: int, timeline: Timeline
    ) -> tuple[Sequence[tuple[float, float]], int]:
        """The sizes of the first `max_pages` pages in points, and the number of all pages."""
        ...

    async def count_frames(self, data: bytes, timeline: Timeline) -> int:
        """The number of frames or pages of an image."""
        ...


@dataclass(frozen=True)
class Bounds:
    """How many images a request, frames an animation and pages a PDF may give; `pdf_dpi` is the
    resolution of pages in dots per inch."""

    max_images: int
    max_frames: int
    max_pages: int
    pdf_dpi: float
    limits: Limits


@dataclass
class ReadRequest:
    """A request whose options were read; `pending` are parts that become several images."""

    request: ImageRequest
    document: Any
    changed: bool
    pending: list[tuple[Part, Wish]]


class RequestPreparer:
    """Makes an `ImageRequest` of a body."""

    def __init__(self, loader: ImageLoader, inspector: Inspector, bounds: Bounds) -> None:
        self.loader = loader
        self._inspector = inspector
        self.bounds = bounds

    def read(self, taken: TakenOut) -> ReadRequest:
        """The part that needs no image: options, budget, counts. Its time grows with the body.

        Raises:
            ClientError: a wrong option; TooManyImages; InvalidImageUrl; UnknownFile; FilesDisabled.
        """
        request = ImageRequest(record.current(), body=taken.body, payloads=taken.payloads)
        result = ReadRequest(request, taken.document, False, [])
        if not isinstance(taken.document, dict):
            return result
        result.changed = _take_request_options(taken.document, request)
        for number, part in enumerate(parts.parts_of(taken.document), 1):
            self._check_count(number, part)
            self._read_part(part, result)
        return result

    def _read_part(self, part: Part, result: ReadRequest) -> None:
        parts.refuse_forged(part)
        self._check_stored(part)
        wish = parts.take_wish(part)
        if part.kind == "file" or (wish is not None and wish.frames is not None):
            result.pending.append((part, wish or Wish(ImageOptions())))
            return
        name = part.name
        if wish is not None or part.file_id is not None:
            url = parts.url_of(part) if part.has_data else part.name
            name = parts.with_options(url, wish.options) if wish is not None else url
            parts.set_name(part, name)
            result.changed = True
        result.request.parts.append((part.path, name))

    def _check_stored(self, part: Part) -> None:
        """Raises UnknownFile or FilesDisabled, before a route can make another error of it."""
        if part.file_id is None:
            return
        try:
            self.loader.files.get(tenant.group(), part.file_id)
        except ClientError as error:
            error.param = part.path
            raise

    async def complete(self, read: ReadRequest, *, stored: bool) -> ImageRequest:
        """Load and inspect what is pending, and write the body anew where it has changed.

        `stored`: the server keeps the request for later ones, when images that were prepared for
        this one are gone.

        Raises:
            ClientError: the file or image cannot be used, or gives too many images.
        """
        request = read.request
        if read.pending and stored:
            raise ClientError(
                "files and frames cannot be used while responses are stored",
                param=read.pending[0][0].path,
            )
        for part, wish in read.pending:
            try:
                images = await self._images(part, wish)
            except SaccadeError as error:
                error.param = error.param or part.path
                raise
            self._check_count(len(request.parts) + len(images), part)
            if part.kind == "file":  # other images are counted where they are loaded
                for image in images:
                    metrics.image_pixels.observe(math.prod(image.size))
            self._replace(part, images, request)
        if read.changed or read.pending:
            request.body = await _dump(read.document, len(request.body))
        return request

    def _check_count(self, images: int, part: Part) -> None:
        if images > self.bounds.max_images:
            raise TooManyImages(
                f"the request has more than {self.bounds.max_images} images, which is the limit",
                param=part.path,
            )

    def _replace(self, part: Part, images: Sequence[EncodedImage], request: ImageRequest) -> None:
        """Put an image part for each of `images` in the place of `part`."""
        if part.siblings is None:
            raise ClientError("the part must stand in a list of content parts")
        prefix = f"saccade-image-{secrets.token_hex(8)}-"
        new = []
        for number, image in enumerate(images):
            name = f"{prefix}{number}."
            request.prepared[name] = image.named(name, image.options)
            request.parts.append((part.path, name))
            new.append(parts.image_like(part, name))
        place = next(i for i, node in enumerate(part.siblings) if node is part.node)
        part.siblings[place : place + 1] = new

    async def _images(self, part: Part, wish: Wish) -> list[EncodedImage]:
        if part.kind == "file":
            return await self._pages(part, wish)
        if not part.has_data or part.node.get("uuid") is not None:
            raise ClientError("a part with a uuid is one image: it cannot have frames")
        image = await self.loader.image(parts.url_of(part))
        return await self._frames(image, wish)

    async def check(self, data: bytes) -> None:
        """Hold a file that is to be kept against the rules for images and PDFs.

        Raises:
            ClientError: a request that showed it would be refused as well.
        """
        check_bytes(len(data), self.bounds.limits)
        if _is_pdf(data):
            await self._inspector.inspect_pdf(data, 1, record.current().timeline)
        else:
            await in_thread(encoded, data, self.bounds.limits)

    # ------------------------------------------------------------------ frames

    async def _frames(self, image: EncodedImage, wish: Wish) -> list[EncodedImage]:
        frames = wish.frames
        if isinstance(frames, int):
            frames = await self._spread(image, frames)
        assert frames is not None
        if len(frames) > self.bounds.max_frames:
            raise _too_many("frames", len(frames), self.bounds.max_frames)
        return [image.named("", _at(wish.options, frame)) for frame in frames]

    async def _spread(self, image: EncodedImage, wanted: int) -> tuple[int, ...]:
        """`wanted` frames at equal distances, from the first to the last; or all there are."""
        if wanted > self.bounds.max_frames:
            raise _too_many("frames", wanted, self.bounds.max_frames)
        if not image.header.animated or wanted == 1:
            return (0,)
        count = await self._inspector.count_frames(image.data, record.current().timeline)
        if count <= wanted:
            return tuple(range(count))
        return tuple(round(i * (count - 1) / (wanted - 1)) for i in range(wanted))

    # ------------------------------------------------------------------ pages

    async def _pages(self, part: Part, wish: Wish) -> list[EncodedImage]:
        data = await self.loader.data(parts.file_url(part))
        metrics.image_bytes.observe(len(data))
        if not _is_pdf(data):
            if part.file_id is None:
                raise InvalidFile("the file is not a PDF")
            if wish.frames is not None:
                raise InvalidFile("the file is an image and has no pages")
            image = await in_thread(encoded, data, self.bounds.limits)
            return [image.named("", wish.options)]
        name = await in_thread(digest, data)
        most = self.bounds.max_pages
        wanted = wish.frames
        assert not isinstance(wanted, int)
        if wanted is not None and len(wanted) > most:
            raise _too_many("pages", len(wanted), most)
        inspected = max(wanted) + 1 if wanted else most
        sizes, count = await self._inspector.inspect_pdf(data, inspected, record.current().timeline)
        if wanted is None:
            if count > most:
                raise TooManyImages(
                    f"the file has {count} pages, the limit is {most}; choose some with `pages`"
                )
            wanted = tuple(range(count))
        if missing := [page for page in wanted if page >= count]:
            raise ImageFrameMissing(f"the file has {count} pages, and no page {missing[0] + 1}")
        return [
            EncodedImage(data, name, "", self._page_header(sizes[page]), _at(wish.options, page))
            for page in wanted
        ]

    def _page_header(self, points: tuple[float, float]) -> ImageHeader:
        """A page of so many points at the resolution for PDFs, or less if the limits want it."""
        limits, (width, height) = self.bounds.limits, points
        scale = min(
            self.bounds.pdf_dpi / _POINTS_PER_INCH,
            math.sqrt(limits.max_pixels / (width * height)),
            limits.max_side / max(width, height),
        )
        size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        check_size(size, limits)
        return ImageHeader("PDF", *size, orientation=1, animated=False)


def _is_pdf(data: bytes) -> bool:
    return _PDF_MAGIC in data[:_PDF_HEAD_BYTES]


def _at(options: ImageOptions, frame: int) -> ImageOptions:
    return ImageOptions(options.detail, options.max_tokens, frame)


def _too_many(what: str, wanted: int, limit: int) -> TooManyImages:
    return TooManyImages(f"{wanted} {what} were asked for, the limit is {limit}")


def _take_request_options(document: dict[str, Any], request: ImageRequest) -> bool:
    """Move what asks about all images into `request`; whether there was any."""
    budget = document.pop("max_image_tokens", None)
    details = document.pop("include_image_details", None)
    if budget is not None and not parts.is_positive(budget):
        raise ClientError("max_image_tokens must be a positive integer", param="max_image_tokens")
    if details is not None and not isinstance(details, bool):
        raise ClientError("include_image_details must be a boolean", param="include_image_details")
    request.max_image_tokens = budget
    request.include_image_details = bool(details)
    if request.include_image_details and document.get("stream") and "messages" in document:
        # The details come with the usage, so a stream must end with it.
        stream_options = document.get("stream_options") or {}
        if isinstance(stream_options, dict):
            document["stream_options"] = {**stream_options, "include_usage": True}
    return budget is not None or details is not None


async def _dump(document: Any, size: int) -> bytes:
    if size < _LARGE_DOCUMENT_BYTES:
        return json.dumps(document).encode()
    return await in_thread(lambda: json.dumps(document).encode())
