"""An image as it was sent: its file, header, limits, and the options of the request."""

from dataclasses import dataclass, field

from blake3 import blake3

from server.errors import ImageAspectRatio, ImageTooLarge, InvalidImage
from server.imaging import header as headers
from server.imaging.header import ImageHeader
from server.imaging.reduction import Box, Reduction, size_of
from server.imaging.sizing import Size
from server.imaging.tokens import Detail
from server.imaging.tokens.rule import Region


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image. `max_bytes` is for the file, `max_pixels` for width x height, `max_side`
    in pixels; `max_aspect_ratio` is longer side / shorter side."""

    max_bytes: int
    max_pixels: int
    max_side: int
    max_aspect_ratio: float


def check_bytes(nbytes: int, limits: ImageLimits) -> None:
    """Raises ImageTooLarge if a file of `nbytes` is over the limit."""
    if nbytes > limits.max_bytes:
        raise ImageTooLarge(f"the image has {nbytes} bytes, the limit is {limits.max_bytes} bytes")


def check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raises ImageTooLarge or ImageAspectRatio if `size`, (width, height) in pixels, both at least
    1, is over a limit."""
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
class Crop:
    """The part `box` of an upright picture of the size `of`."""

    box: Box
    of: Size

    @property
    def size(self) -> Size:
        return size_of(self.box)


@dataclass(frozen=True)
class ImageOptions:
    """A request's options for one image. `max_tokens` is a cap, `detail` selects one of the model's
    budgets; `frame` is the number, from 0, of a frame or of a PDF's page.

    `reduction` is the policy that `detail` names; None: the server's. `crop` is the part that it
    chose to show; None: all. Where images share a budget, it keeps `least` tokens.
    """

    detail: Detail = "auto"
    max_tokens: int | None = None
    frame: int = 0
    reduction: Reduction | None = None
    crop: Crop | None = None
    least: int | None = None

    def original(self, size: Size) -> Size:
        """The size of the picture that an image of `size` is, or is a part of."""
        return size if self.crop is None else self.crop.of

    def in_original(self, region: Region | None) -> Region | None:
        """`region` of the image, as one of the picture that it is a part of."""
        if self.crop is None or region is None:
            return region
        x, y = self.crop.box[:2]
        return region[0] + x, region[1] + y, region[2] + x, region[3] + y


@dataclass(frozen=True)
class EncodedImage:
    """An image file and the hash of its bytes.

    A page of a PDF is an image too: its file is the PDF, and `header` has the page's size in pixels
    at the resolution set for PDFs.

    Attributes:
        data: the file; empty if only its hash is known.
        digest: BLAKE3 of the file, in hexadecimal.
        header: what its header says.
        options: the request's options for it.
        path: the place of its part in the request, for errors.
    """

    data: bytes = field(repr=False)
    digest: str
    header: ImageHeader
    options: ImageOptions = ImageOptions()
    path: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Upright (width, height) of what is shown of it, in pixels."""
        crop = self.options.crop
        return self.header.size if crop is None else crop.size


def digest(data: bytes | memoryview) -> str:
    """BLAKE3 of a file, in hexadecimal."""
    return blake3(data).hexdigest()


def encoded(data: bytes, limits: ImageLimits) -> EncodedImage:
    """Hash `data`, read its header and check both against `limits`.

    Raises:
        InvalidImage, UnsupportedImageFormat, ImageTooLarge, ImageAspectRatio
    """
    if not data:
        raise InvalidImage("the image is empty")
    check_bytes(len(data), limits)
    header = headers.read(data)
    check_size(header.size, limits)
    return EncodedImage(data, digest(data), header)
