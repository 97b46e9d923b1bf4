"""What an image may be, judged by its header before any pixel is decoded."""

from dataclasses import dataclass

from server.errors import ImageAspectRatio, ImageTooLarge


@dataclass(frozen=True)
class Limits:
    """`max_bytes` of the file, `max_pixels` and `max_side` in pixels, `max_aspect_ratio` of the
    longer side to the shorter."""

    max_bytes: int
    max_pixels: int
    max_side: int
    max_aspect_ratio: float


def check_bytes(nbytes: int, limits: Limits) -> None:
    """Raises ImageTooLarge."""
    if nbytes > limits.max_bytes:
        raise ImageTooLarge(f"the image has {nbytes} bytes, the limit is {limits.max_bytes} bytes")


def check_size(size: tuple[int, int], limits: Limits) -> None:
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
