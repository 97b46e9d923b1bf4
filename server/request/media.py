"""One media part of a request: where its bytes are, what it asks for, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from server.imaging.encoded import EncodedImage, ImageLimits, ImageOptions
from server.imaging.sampling import SamplingOptions
from server.imaging.video.header import VideoHeader
from server.imaging.video.limits import VideoLimits

Kind = Literal["image", "file", "video", "audio"]


@dataclass(frozen=True)
class Inline:
    """Bytes inside the body: a base64 text, or a `data:` URL. It is a view of the body where it is
    long, and may then hold JSON escapes of line breaks and slashes."""

    text: str | memoryview = field(repr=False)


@dataclass(frozen=True)
class Remote:
    """Bytes at an `http:`, `https:` or `file:` URL."""

    url: str


@dataclass(frozen=True)
class Uploaded:
    """Bytes of a file that was sent to `/v1/files` before."""

    file_id: str


@dataclass(frozen=True)
class SentBefore:
    """No bytes: an image that an earlier request sent under the same uuid."""


@dataclass(frozen=True)
class MediaLimits:
    """How much media a request may have.

    Attributes:
        max_images: images of a request, with all pages and frames.
        max_clips: video and audio clips of a request, by kind. A kind that is missing is not taken
            by the model.
        max_frames: frames of an animation.
        max_pages: pages of a PDF.
        max_page_characters: characters of a page's text.
        pdf_dpi: the resolution of pages in dots per inch.
        image: what one image or file may be.
        max_clip_bytes: the file of a video or an audio clip, in bytes.
        max_shown_frames: frames of a video that the model may get.
        video: what a video may be, by its header.
    """

    max_images: int
    max_clips: Mapping[str, int]
    max_frames: int
    max_pages: int
    max_page_characters: int
    pdf_dpi: float
    image: ImageLimits
    max_clip_bytes: int
    max_shown_frames: int
    video: VideoLimits


Single: TypeAlias = Inline | Remote | Uploaded


@dataclass(frozen=True)
class Pictures:
    """The frames of a video, in their order."""

    frames: tuple[Single, ...]


Source: TypeAlias = Single | SentBefore | Pictures


@dataclass(eq=False)
class MediaRef:
    """A media part.

    Attributes:
        kind: what the part claims to be. An image may turn out to be a PDF, and a file an image.
        path: where it stands in the request: "messages[0].content[1].image_url".
        source: where its bytes are; None once they are loaded.
        options: what it asks of each of its images.
        frames: the frames of an animation or the pages of a file, counted from 0; or how many to
            spread over all of them; None: the first frame, all pages.
        uuid: the client's own name for the image, under which it may be sent again without data.
        role: that of the message that it stands in, where it has one.
        include_text: whether the text of a PDF's pages stands before their pictures.
        texts: the text of each page that has one, by its number from 0.
        images: what was loaded: one image, or one for each page or frame.
        data: what was loaded of a video or an audio clip: its file, or what `pictures.pack` makes
            of a video's pictures; empty if it was only named by its uuid.
        digest: BLAKE3 of the file of a video, in hexadecimal.
        sampling: what it asks of the frames of a video.
        video: what the header of a video says; None before it is loaded.
    """

    kind: Kind
    path: str
    source: Source | None
    options: ImageOptions = field(default_factory=ImageOptions)
    frames: tuple[int, ...] | int | None = None
    uuid: str | None = None
    role: str | None = None
    include_text: bool = False
    texts: dict[int, str] = field(default_factory=dict)
    images: list[EncodedImage] = field(default_factory=list)
    data: bytes = field(default=b"", repr=False)
    digest: str = ""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    video: VideoHeader | None = None

    def texts_before(self) -> list[str | None]:
        """For each image, or for the clip, the text that stands before it in the prompt."""
        texts = dict(self.texts)
        return [texts.pop(image.options.frame, None) for image in self.images] or [None]
