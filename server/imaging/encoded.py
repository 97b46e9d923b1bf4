"""An image as it was sent: its file, what its header says, and how the request wants it shown."""

from dataclasses import dataclass, field

from blake3 import blake3

from server.errors import ImageAspectRatio, ImageTooLarge, InvalidImage
from server.imaging import header as headers
from server.imaging.header import ImageHeader
from server.imaging.tokens import Detail


@dataclass(frozen=True)
class ImageLimits:
    """`max_bytes` of the file, `max_pixels` and `max_side` in pixels, `max_aspect_ratio` of the
    longer side to the shorter."""

    max_bytes: int
    max_pixels: int
    max_side: int
    max_aspect_ratio: float


def check_bytes(nbytes: int, limits: ImageLimits) -> None:
    """Raises ImageTooLarge."""
    if nbytes > limits.max_bytes:
        raise ImageTooLarge(f"the image has {nbytes} bytes, the limit is {limits.max_bytes} bytes")


def check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raises ImageTooLarge or ImageAspectRatio. `size` is (width, height), both at least 1."""
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width}x{height} = {width * height} pixels, "
            f"the limit is {limits.max_pixels} pixels"
        )
    if max(size) > limits.max_side:
        raise ImageTooLarge(
            f"the image has {width}x{height} pixels, the limit for a side is {limits.max_side}"
        )
    ratio = max(size) / min(size)
    if ratio > limits.max_aspect_ratio:
        raise ImageAspectRatio(
            f"the image has {width}x{height} pixels, {ratio:.0f}:1; "
            f"the limit is {limits.max_aspect_ratio:g}:1"
        )


@dataclass(frozen=True)
class ImageOptions:
    """What a request may say about one image. `max_tokens` caps it, `detail` names a budget of the
    model's; `frame` counts from 0, and is a page where the file is a PDF."""

    detail: Detail = "auto"
    max_tokens: int | None = None
    frame: int = 0


@dataclass(frozen=True)
class EncodedImage:
    """An image file and the hash of its bytes.

    A page of a PDF is an image as well: its file is the PDF, and `header` tells the page's size in
    pixels at the resolution that is set for PDFs.

    Attributes:
        data: the file; empty where only its hash is known any more.
        digest: BLAKE3 of the file, in hexadecimal.
        header: what its header says.
        options: how the request wants it shown.
        path: the place of its part in the request, for errors.
    """

    data: bytes = field(repr=False)
    digest: str
    header: ImageHeader
    options: ImageOptions = ImageOptions()
    path: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Upright (width, height), in pixels."""
        return self.header.size


def digest(data: bytes) -> str:
    """The name of a file's content, by which it is recognised."""
    return blake3(data).hexdigest()


def encoded(data: bytes, limits: ImageLimits) -> EncodedImage:
    """Hash `data`, read its header and hold both against `limits`.

    Raises:
        InvalidImage, UnsupportedImageFormat, ImageTooLarge, ImageAspectRatio
    """
    if not data:
        raise InvalidImage("the image is empty")
    check_bytes(len(data), limits)
    header = headers.read(data)
    check_size(header.size, limits)
    return EncodedImage(data, digest(data), header)
