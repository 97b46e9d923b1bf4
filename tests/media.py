"""Requests with media, parsed and loaded as in the server, without starting one."""

import asyncio
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from server.imaging import pdf as pdfs
from server.imaging.decode import frame_count
from server.imaging.encoded import EncodedImage, ImageLimits
from server.imaging.video.limits import VideoLimits
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.files import FileStore
from server.ingest.load import MediaLoader
from server.request.bounds import BodyBounds
from server.request.context import RequestContext
from server.request.dialects import dialect_of
from server.request.media import MediaLimits
from server.request.read import ReadRequest, RequestReader
from server.telemetry.record import Record
from tests import hostile_pdfs, pictures

LIMITS = MediaLimits(
    max_images=8,
    max_clips={"video": 2, "audio": 2},
    max_frames=5,
    max_pages=4,
    max_page_characters=1000,
    pdf_dpi=144,
    image=ImageLimits(50 << 20, 100_000_000, 32_768, 200),
    max_clip_bytes=100_000,
    max_shown_frames=40,
    video=VideoLimits(max_pixels=1_000_000, max_seconds=60, max_frames=1000),
)
MAX_JSON_BYTES = 1 << 20
BOUNDS = BodyBounds(MAX_JSON_BYTES, values=300_000, depth=128, items=2048)
CHAT = "/v1/chat/completions"
EMBEDDINGS = frozenset({"image_embeds"})


class InProcess:
    """Inspects files as the image workers do, in this process."""

    async def inspect_pdf(
        self, data: bytes, max_pages: int, record: Record
    ) -> tuple[Sequence[tuple[float, float]], int]:
        sizes, count = pdfs.page_sizes(data, max_pages)
        return [(width, height) for width, height in sizes], count

    async def pdf_text(self, data: bytes, page: int, most: int, record: Record) -> str:
        return pdfs.text(data, page, most)

    async def count_frames(self, data: bytes, record: Record) -> int:
        return frame_count(data)


def reader(
    limits: MediaLimits | None = LIMITS, embeddings: frozenset[str] = frozenset()
) -> RequestReader:
    return RequestReader(limits, embeddings, BOUNDS)


def read(document: Any, path: str = CHAT, **more: Any) -> ReadRequest:
    """Parse a body, or an object that is encoded as one, for the route at `path`."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return reader(**more).read(body, dialect_of(path), Record())


def media_loader(store: FileStore | None = None) -> MediaLoader:
    expander = Expander(InProcess(), LIMITS)
    return MediaLoader(Fetcher(FetchSettings()), LIMITS, None, store, expander)


_loader = functools.cache(media_loader)


@dataclass
class Prepared:
    """A request as its route gets it: `body` with handles, which `context` resolves."""

    context: RequestContext
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def content(self, key: str = "messages") -> list[Any]:
        """The parts of the first message."""
        parts: list[Any] = self.document[key][0]["content"]
        return parts

    def image(self, handle: str) -> EncodedImage:
        resolved = self.context.resolve(handle)
        assert resolved is not None
        assert resolved.image is not None
        return resolved.image

    def shown(self) -> list[EncodedImage]:
        """The images that the route requests, in the order of the body."""
        urls = [p["image_url"]["url"] for p in self.content() if p["type"] == "image_url"]
        return [self.image(url) for url in urls]


def prepare(document: Any, path: str = CHAT, loader: MediaLoader | None = None) -> Prepared:
    """Parse a request and load its media."""
    found = read(document, path)
    asyncio.run((loader or _loader()).load(found.context))
    return Prepared(found.context, found.rewritten())


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": pictures.user(*parts), **more}


def pdf(*sizes: tuple[int, int], color: str = "white") -> bytes:
    """A PDF with one page for each size in points."""
    pages = [Image.new("RGB", size, color) for size in sizes]
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:], resolution=72)
    return file.getvalue()


def lettered(text: str) -> bytes:
    """A PDF of one page with a text layer."""
    entries = b"/MediaBox [0 0 200 80] /Resources << /Font << /F1 5 0 R >> >>"
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    content = f"BT /F1 12 Tf 10 40 Td ({text}) Tj ET".encode()
    return hostile_pdfs.page(entries, content=content, o5=font)


def gif(frames: int) -> bytes:
    """An animation of `frames` frames, each in a different red."""
    images = [Image.new("RGB", (40, 30), (index * 10, 0, 0)) for index in range(frames)]
    return pictures.encode(images[0], "GIF", save_all=True, append_images=images[1:])


def file_part(data: bytes, **more: Any) -> dict[str, Any]:
    """A chat part with a file."""
    url = pictures.data_url(data, "application/pdf")
    return {"type": "file", "file": {"file_data": url, "filename": "a.pdf", **more}}
