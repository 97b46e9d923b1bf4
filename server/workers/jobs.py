"""The jobs of image workers.

Every value that a client can choose is checked when its job is made, so workers never receive a
value that is out of range.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from server.errors import ClientError, ImageFrameMissing
from server.imaging.reduction import Box
from server.imaging.sizing import Size

MAX_INT32 = 2**31 - 1
# Formats whose frames build on each other. (The pages of TIFF and PDF files do not.)
ANIMATED = frozenset(("GIF", "PNG", "WEBP", "AVIF"))
MAX_KWARGS_BYTES = 32 * 1024
_MAX_DEPTH = 16
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1
_IMAGE_MODES = frozenset(
    ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV",
     "I", "I;16", "F")
)  # fmt: skip


class DecodeIO(msgspec.Struct, frozen=True):
    """vLLM's `media_io_kwargs` for images. `image_mode` is a mode of Pillow's, or None to keep the
    file's; `background` is the RGB colour under transparent pixels."""

    image_mode: str | None = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "DecodeIO":
        """From `media_io_kwargs["image"]`; options that vLLM ignores are ignored.

        Raises:
            ClientError: vLLM does not accept a value.
        """
        mode = kwargs.get("image_mode", "RGB")
        background = kwargs.get("rgba_background_color", (255, 255, 255))
        if mode is not None and (not isinstance(mode, str) or mode not in _IMAGE_MODES):
            raise _invalid_io("image_mode", "must be one of Pillow's image modes or null")
        if (
            not isinstance(background, list | tuple)
            or len(background) != 3
            or not all(type(level) is int and 0 <= level <= 255 for level in background)
        ):
            raise _invalid_io("rgba_background_color", "must be a list of 3 integers from 0 to 255")
        red, green, blue = background
        return cls(mode, (red, green, blue))


class PictureJob(msgspec.Struct, frozen=True):
    """Decode one picture. `format` and the upright `size` are what its header says.

    `frame` counts frames of an animation or pages of a PDF from 0. `crop` is the part that is
    wanted, if not all: left, top, right, bottom. `resize` is the exact size to resize it to, if
    any. Sizes are (width, height) in pixels.
    """

    format: str
    size: Size
    frame: int = 0
    resize: Size | None = None
    io: DecodeIO = DecodeIO()
    crop: Box | None = None

    def __post_init__(self) -> None:
        if not all(1 <= side <= MAX_INT32 for side in (*self.size, *(self.resize or ()))):
            raise ClientError("the size of the image is out of range")
        if not 0 <= self.frame <= MAX_INT32:
            raise ImageFrameMissing("the frame number is out of range")


class PixelsJob(PictureJob, frozen=True, tag="pixels"):
    """Returns the decoded picture: `pixels`, (height, width, channels), usually uint8."""


class ProcessJob(PictureJob, frozen=True, tag="process"):
    """Returns the output of the model's processor for the picture. `kwargs`: see
    `encode_kwargs`."""

    kwargs: bytes = b"{}"


class FindDetail(PictureJob, frozen=True, tag="find_detail"):
    """Returns the `blocks` with detail of the picture, as `imaging.detail.blocks` does. `resize` is
    the size at which it is looked at."""


class InspectPdf(msgspec.Struct, frozen=True, tag="inspect_pdf"):
    """Returns the `count` of all pages, and `sizes`, float64 (pages, 2): width and height of the
    first `max_pages` pages in points (1/72 inch)."""

    max_pages: int


class PdfText(msgspec.Struct, frozen=True, tag="pdf_text"):
    """Returns the `text` of page `page` (from 0) of a PDF, UTF-8 as uint8, of at most
    `max_characters`."""

    page: int
    max_characters: int


class CountFrames(msgspec.Struct, frozen=True, tag="count_frames"):
    """Returns the `count` of frames or pages of an image."""


Job: TypeAlias = PixelsJob | ProcessJob | FindDetail | InspectPdf | PdfText | CountFrames


def encode_job(job: Job) -> bytes:
    """`job` in msgpack; equal jobs give equal bytes."""
    return msgspec.msgpack.encode(job)


def encode_kwargs(kwargs: Mapping[str, Any]) -> bytes:
    """Keyword arguments of the model's processor as JSON; equal ones give equal bytes.

    Raises:
        ClientError: they are not JSON, contain a number that is not finite or does not fit
            64 bits, or are nested too deep or too long.
    """
    if not kwargs:
        return b"{}"
    _check_json(dict(kwargs), _MAX_DEPTH)
    encoded = msgspec.json.encode(kwargs, order="deterministic")
    if len(encoded) > MAX_KWARGS_BYTES:
        raise _invalid_kwargs(f"take {len(encoded)} bytes, the limit is {MAX_KWARGS_BYTES}")
    return encoded


def decode_kwargs(kwargs: bytes) -> dict[str, Any]:
    """The inverse of `encode_kwargs`; tuples come back as lists."""
    decoded: dict[str, Any] = msgspec.json.decode(kwargs)
    return decoded


def _check_json(value: Any, depth: int) -> None:
    if depth == 0:
        raise _invalid_kwargs(f"are nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise _invalid_kwargs("must have strings as keys")
            _check_text(name)
            _check_json(item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item, depth - 1)
    elif isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int):
        if not _MIN_INT64 <= value <= _MAX_INT64:
            raise _invalid_kwargs("contain an integer that does not fit 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _invalid_kwargs("contain a number that is not finite")
    elif value is not None:
        raise _invalid_kwargs("must be JSON values")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid_kwargs("contain text that is not valid Unicode") from None


def _invalid_kwargs(problem: str) -> ClientError:
    return ClientError(f"the image processor options {problem}", param="mm_processor_kwargs")


def _invalid_io(name: str, problem: str) -> ClientError:
    return ClientError(f"{name} {problem}", param=f"media_io_kwargs.image.{name}")
