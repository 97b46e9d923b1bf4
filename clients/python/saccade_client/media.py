"""Pictures, documents and videos to send, from whatever the caller has."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from saccade_client.errors import UnusableMedia

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saccade_client.shrink import Encoded

Detail = Literal["auto", "low", "high", "trim", "salient"]
PDF_DPI = 144.0

_VIDEO_SUFFIXES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".avi": "video/x-msvideo",
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, and how much the model is to see of it.

    `source` is an encoded file, pixels, or a URL; `file_id` names an upload instead. `max_tokens`
    caps the picture's tokens, `frames` selects frames of an animation: how many, or which, from 0.
    `detail` works everywhere, but the other two, "trim" (without margins) and "salient" (a small
    view of the whole, and crops where there is detail) with Saccade only.
    """

    source: bytes | Image.Image | str | None
    file_id: str | None = None
    detail: Detail | None = None
    max_tokens: int | None = None
    frames: int | tuple[int, ...] | None = None
    # As it was sent, by the size and quality.
    files: "dict[tuple[tuple[int, int] | None, int], Encoded]" = field(
        default_factory=dict, repr=False
    )

    @property
    def is_reduced(self) -> bool:
        """Whether the server chooses what the model sees, of all the detail that there is."""
        return self.detail in ("trim", "salient")

    @property
    def url(self) -> str | None:
        """The URL of a picture that the server fetches."""
        return self.source if isinstance(self.source, str) else None


@dataclass(frozen=True, eq=False)
class Document:
    """A PDF: its bytes, or the `file_id` of an upload. `pages` selects pages, such as "1-3,7"."""

    data: bytes | None
    pages: str | None = None
    file_id: str | None = None
    name: str = "document.pdf"


@dataclass(frozen=True, eq=False)
class Video:
    """A video: its bytes and their media type, or a URL."""

    source: bytes | str
    media_type: str = "video/mp4"


Media: TypeAlias = Picture | Document | Video
MediaSource: TypeAlias = "Media | str | Path | bytes | Image.Image | NDArray[Any]"


def picture(
    source: "MediaSource",
    *,
    detail: Detail | None = None,
    max_tokens: int | None = None,
    frames: int | Sequence[int] | None = None,
) -> Picture:
    """A picture from a path, a URL, the bytes of a file, a PIL image or an array.

    An array has the shape (height, width), (height, width, 3) for RGB or (height, width, 4) for
    RGBA, and the dtype uint8.

    Raises:
        UnusableMedia: the file cannot be read, or the array is no picture.
    """
    chosen = frames if frames is None or isinstance(frames, int) else tuple(frames)
    options: dict[str, Any] = {"detail": detail, "max_tokens": max_tokens, "frames": chosen}
    if isinstance(source, Picture):
        return Picture(source.source, source.file_id, **options)
    if isinstance(source, Document | Video):
        raise UnusableMedia(f"a {type(source).__name__} is not a picture")
    if isinstance(source, str) and is_url(source):
        return Picture(source, **options)
    if isinstance(source, bytes | Image.Image):
        return Picture(source, **options)
    if isinstance(source, str | Path):
        return Picture(_read(source), **options)
    return Picture(_of_array(source), **options)


def pdf(source: str | Path | bytes, *, pages: str | None = None) -> Document:
    """A PDF from a path or its bytes. Raises UnusableMedia if the file cannot be read."""
    if isinstance(source, bytes):
        return Document(source, pages)
    return Document(_read(source), pages, name=Path(source).name)


def video(source: str | Path | bytes, *, media_type: str | None = None) -> Video:
    """A video from a path, a URL or its bytes. Raises UnusableMedia if the file cannot be read."""
    if isinstance(source, bytes):
        return Video(source, media_type or "video/mp4")
    guessed = _VIDEO_SUFFIXES.get(Path(source).suffix.lower(), "video/mp4")
    if isinstance(source, str) and is_url(source):
        return Video(source, media_type or guessed)
    return Video(_read(source), media_type or guessed)


def media(source: "MediaSource") -> Media:
    """What `source` is: a PDF by its first bytes, a video by its name or first bytes, or a picture.

    Raises:
        UnusableMedia: it cannot be read.
    """
    if isinstance(source, Picture | Document | Video):
        return source
    if isinstance(source, str | Path) and Path(source).suffix.lower() in _VIDEO_SUFFIXES:
        return video(source)
    made = picture(source)
    if isinstance(made.source, bytes):
        if b"%PDF-" in made.source[:1024]:
            name = Path(source).name if isinstance(source, str | Path) else Document.name
            return Document(made.source, name=name)
        if (media_type := _video_type(made.source)) is not None:
            return Video(made.source, media_type)
    return made


def rendered(document: Document, *, dpi: float = PDF_DPI) -> list[Picture]:
    """The pages of a PDF as pictures, for servers that take no PDF. Needs pypdfium2 (the extra
    `pdf`).

    Raises:
        UnusableMedia: the PDF is damaged, a page does not exist, or pypdfium2 is missing.
    """
    try:
        import pypdfium2
    except ImportError:
        raise UnusableMedia(
            "this server takes no PDF, and pypdfium2 is needed to draw its pages"
        ) from None
    if document.data is None:
        raise UnusableMedia("an uploaded PDF cannot be rendered here")
    try:
        with pypdfium2.PdfDocument(document.data) as opened:
            return [
                Picture(opened[number].render(scale=dpi / 72).to_pil())
                for number in page_numbers(document.pages, len(opened))
            ]
    except pypdfium2.PdfiumError as error:
        raise UnusableMedia(f"the PDF cannot be read: {error}") from None


def page_numbers(pages: str | None, count: int) -> list[int]:
    """The numbers, from 0, that a text such as "1-3,7" selects of `count` pages; None: all.

    Raises:
        UnusableMedia: the text is wrong, or a page does not exist.
    """
    if pages is None:
        return list(range(count))
    numbers: list[int] = []
    for piece in pages.split(","):
        first, dash, last = piece.partition("-")
        try:
            start, end = int(first), int(last if dash else first)
        except ValueError:
            raise UnusableMedia(f'pages must be numbers such as "1-3,7", not {pages!r}') from None
        if not 1 <= start <= end <= count:
            raise UnusableMedia(f"the document has pages 1 to {count}, not {piece.strip()}")
        numbers += range(start - 1, end)
    return numbers


def opened(source: "MediaSource") -> Image.Image:
    """The pixels of a picture, upright. Raises UnusableMedia if there are none here."""
    made = source if isinstance(source, Picture) else picture(source)
    if isinstance(made.source, Image.Image):
        return made.source
    if not isinstance(made.source, bytes):
        raise UnusableMedia("a URL or an upload has no pixels here")
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(made.source)))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableMedia(f"the picture cannot be read: {error}") from None


def media_type(data: bytes) -> str:
    """The media type of an encoded picture; a general one if it is unknown."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Image.MIME.get(image.format or "", "application/octet-stream")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        if data[4:8] == b"ftyp":
            return "image/heic"
        return "application/octet-stream"


def _of_array(array: Any) -> Image.Image:
    try:
        return Image.fromarray(array)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UnusableMedia(f"a {type(array).__name__} is not a picture: {error}") from None


def is_url(text: str) -> bool:
    """Whether a text is a URL and not a path."""
    return text.startswith(("http://", "https://", "data:", "file://"))


def _read(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UnusableMedia(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if not data:
        raise UnusableMedia(f"{path} is empty")
    return data


def _video_type(data: bytes) -> str | None:
    """The media type of a video by its first bytes."""
    if data[4:8] == b"ftyp" and data[8:11] in (b"iso", b"mp4", b"avc", b"M4V", b"qt "):
        return "video/mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "video/x-matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "video/x-msvideo"
    return None
