"""Makes a picture as small as the model will see it, before it is sent."""

import functools
import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from saccade_client.media import Picture, media_type

Size = tuple[int, int]

_OPAQUE = ("RGB", "L")
# Others (16 bits, CMYK, palettes) are sent as they are: to resize them means to convert them.
_RESIZABLE = (*_OPAQUE, "RGBA", "LA")
_LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF", "MPO")
# Pillow first shrinks by whole factors to this many times the size, which is faster.
_REDUCING_GAP = 3.0
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Encoded:
    """A picture as it is sent: its file, the caller's size and the size sent; None if unknown."""

    data: bytes
    size: Size | None
    sent_size: Size | None

    @functools.cached_property
    def name(self) -> str:
        """Names these bytes towards the server."""
        return "sha256-" + hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def media_type(self) -> str:
        """Such as "image/jpeg"."""
        return media_type(self.data)


def upright_size(picture: Picture) -> Size | None:
    """Width and height after the EXIF rotation, from the header alone. None if this picture cannot
    be resized here: an animation, an odd mode, or no picture that Pillow reads."""
    try:
        image = _opened(picture)
        turned = image.getexif().get(_ORIENTATION) in _TURNED  # reads a whole PNG
    except _UNREADABLE:
        return None
    if image.mode not in _RESIZABLE or getattr(image, "n_frames", 1) > 1:
        return None
    width, height = image.size
    return (height, width) if turned else (width, height)


def encoded(picture: Picture, size: Size | None, target: Size | None, quality: int) -> Encoded:
    """The picture as a file, resized to `target` if it gets smaller by that. `size` is its upright
    size. A picture keeps its files as long as it lives. Takes time."""
    key = (target, quality)
    if (kept := picture.files.get(key)) is None:
        kept = picture.files[key] = _encode(picture, size, target, quality)
    return kept


def _encode(picture: Picture, size: Size | None, target: Size | None, quality: int) -> Encoded:
    data = picture.source if isinstance(picture.source, bytes) else None
    small = _resized(picture, target, quality) if target is not None else None
    if small is not None and (data is None or len(small) < len(data)):
        return Encoded(small, size, target)
    if data is None:
        data = _file(ImageOps.exif_transpose(_opened(picture)))
    return Encoded(data, size, size)


def _resized(picture: Picture, target: Size, quality: int) -> bytes | None:
    """The upright picture at this size: as a JPEG if it was lossy before, or else a PNG. None if it
    is damaged."""
    try:
        image = _opened(picture)
        is_lossy = image.format in _LOSSY and image.mode in _OPAQUE
        if isinstance(picture.source, bytes):
            image.draft(None, (2 * max(target), 2 * max(target)))
        image = ImageOps.exif_transpose(image)
        image = image.resize(target, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
        return _file(image, quality if is_lossy else None)
    except _UNREADABLE:
        return None


def _opened(picture: Picture) -> Image.Image:
    if isinstance(picture.source, Image.Image):
        return picture.source
    assert isinstance(picture.source, bytes)
    return Image.open(io.BytesIO(picture.source))


def _file(image: Image.Image, quality: int | None = None) -> bytes:
    """A JPEG of this quality, with all of its colour resolution; None: a PNG."""
    profile = image.info.get("icc_profile")
    with io.BytesIO() as file:
        if quality is None:
            image.save(file, "PNG", icc_profile=profile)
        else:
            image.save(file, "JPEG", quality=quality, subsampling=0, icc_profile=profile)
        return file.getvalue()
