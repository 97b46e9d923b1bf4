"""Formats that Pillow decodes: GIF, BMP and TIFF, and PNG, AVIF and animations for other
modules."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

from PIL import Image

from server.errors import ImageTooLarge, InvalidImage, UnsupportedImageFormat
from server.imaging.codecs.base import (
    BY_MEANS,
    BYTES_PER_PIXEL,
    MAX_FRAMES,
    NO_REDUCTIONS,
    Stored,
    damaged,
    eight_bits,
    load_large,
    no_frame,
    orientation,
    profile,
    truncated,
)
from server.imaging.sizing import Size

# Pillow's limit is checked while a file is opened, and its error does not have the size. The
# server's limit replaces it.
Image.MAX_IMAGE_PIXELS = None

# Frames of an animation build on each other, so a frame is decoded with all frames before it.
MAX_ANIMATED_PIXELS = 1_000_000_000

# Most memory of decoding a frame of an animation, in bytes a pixel.
FRAMES_BYTES_PER_PIXEL = 19

# The supported TIFF compressions: none, fax, LZW, JPEG, deflate, run lengths.
_CODINGS = frozenset(
    (
        *("raw", "packbits", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "tiff_deflate"),
        *("tiff_ccitt", "group3", "group4"),
    )
)
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT = 258, 262, 322, 323
_PLACES = (273, 324), (279, 325)  # offsets and lengths in bytes of strips or of tiles
_WHITE_IS_ZERO, _RGB = 0, 2
_MAX_TILE_PIXELS = 1 << 26
# About 100 MB in RGB. Larger pictures are streamed.
_MAX_WHOLE_PIXELS = 32_000_000


class PillowSource:
    """A picture opened by Pillow. `frame` counts from 0 and is decoded with all frames before it,
    or with those since the last frame that was decoded."""

    reductions = NO_REDUCTIONS
    keeps = False
    """Whether `load` will be called again for another frame."""

    def __init__(self, data: bytes, frame: int, format_: str) -> None:
        self._data = data
        self._image = Image.open(io.BytesIO(data), formats=(format_,))
        self.orientation = orientation(self._image)
        self.profile = profile(self._image)
        self.move_to(frame)

    def move_to(self, frame: int) -> None:
        """Select another frame. Raises ImageFrameMissing."""
        self._frame = frame
        self.size = self._canvas()
        # Pillow keeps the frame before, and the one to go back to.
        self.bytes_per_pixel = FRAMES_BYTES_PER_PIXEL if frame else BYTES_PER_PIXEL

    def _canvas(self) -> Size:
        """The size of the wanted frame, before seeking to it."""
        if self._frame >= min(getattr(self._image, "n_frames", 1), MAX_FRAMES):
            raise no_frame(self._frame)
        return self._image.size

    def load(self, factor: int) -> Stored:
        if self._frame:
            _check_work(self.size, self._frame)
            _seek(self._image, self._frame)
        image = self._image
        if not self.keeps:
            del self._image  # its memory may be needed after a conversion
        image.load()
        return eight_bits(image)


class BmpSource(PillowSource):
    """A BMP file, checked for truncation."""

    def __init__(self, data: bytes, frame: int) -> None:
        super().__init__(data, frame, "BMP")
        for tile in self._image.tile:
            # Pillow does not notice when bytes that pad the last row are missing.
            if tile.codec_name == "raw" and isinstance(tile.args, tuple):
                _, row_bytes, _ = tile.args
                if tile.offset + row_bytes * self.size[1] > len(data):
                    raise truncated()


class GifSource(PillowSource):
    """A frame of a GIF file, checked for truncation."""

    def __init__(self, data: bytes, frame: int) -> None:
        if not _has_end(data):
            raise truncated()
        super().__init__(data, frame, "GIF")

    def _canvas(self) -> Size:
        """Frames may extend beyond the first one, and Pillow then enlarges the picture."""
        if not self._frame:
            return self._image.size
        reaches = list(itertools.islice(_gif_frames(self._data), min(self._frame + 1, MAX_FRAMES)))
        if len(reaches) <= self._frame:
            raise no_frame(self._frame)
        widths, heights = zip(self._image.size, *reaches, strict=True)
        return max(widths), max(heights)


class TiffSource:
    """A page of a TIFF file. Pillow turns it upright itself and returns its upright size."""

    orientation = 1

    def __init__(self, data: bytes, frame: int) -> None:
        image: Any = Image.open(io.BytesIO(data), formats=("TIFF",))
        if frame >= MAX_FRAMES:
            raise no_frame(frame)
        _seek(image, frame)
        _check_coding(image)
        _check_extent(image, data)
        self._data = data
        self._image = image
        self.size: Size = image.size
        self.bytes_per_pixel = BYTES_PER_PIXEL
        self.profile = profile(image)
        turned = orientation(image) != 1
        if turned:  # Pillow turns the picture into another one
            self.bytes_per_pixel = 12
        streams = _streams(image) and not frame and not turned
        self.reductions = BY_MEANS if streams else NO_REDUCTIONS

    def load(self, factor: int) -> Stored:
        if factor > 1:
            return load_large("tiffload", self._data, self.size, factor)
        image = self._image
        del self._image  # its memory may be needed after a conversion
        image.load()
        bits = image.tag_v2.get(_BITS, (16,))[0]
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return eight_bits(image, bits, white_is_zero)


def count_frames(data: bytes, format_: str) -> int:
    """The number of frames or pages, up to `MAX_FRAMES`."""
    if format_ == "GIF":
        return sum(1 for _ in itertools.islice(_gif_frames(data), MAX_FRAMES))
    image = Image.open(io.BytesIO(data), formats=(format_,))
    if format_ != "TIFF":
        return min(getattr(image, "n_frames", 1), MAX_FRAMES)
    for page in range(1, MAX_FRAMES):
        try:
            image.seek(page)
        except EOFError:
            return page
    return MAX_FRAMES


def _check_coding(image: Any) -> None:
    """
    Raises:
        UnsupportedImageFormat: the compression is not supported.
        InvalidImage: the tiles are larger than in any real picture.
    """
    coding = image.info.get("compression")
    if coding not in _CODINGS:
        raise UnsupportedImageFormat(f"TIFF files with {coding} compression are not supported")
    width, height = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if width * height > _MAX_TILE_PIXELS:
        raise InvalidImage(f"the image has tiles of {width}x{height} pixels")


def _check_extent(image: Any, data: bytes) -> None:
    """
    Raises:
        InvalidImage: the page's data, its directory or the next one lies beyond the end of the
        file.
    """
    tags = image.tag_v2
    starts, counts = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in _PLACES)
    ends = [start + count for start, count in zip(starts, counts, strict=False)]
    if not tags._bigtiff:
        entries = int.from_bytes(
            data[tags._offset : tags._offset + 2], "little" if data[:1] == b"I" else "big"
        )
        ends.append(tags._offset + 2 + 12 * entries + 4)
    if max(ends, default=0) > len(data) or tags.next >= len(data):
        raise truncated()


def _streams(image: Any) -> bool:
    """Whether the picture is large and libvips decodes it to the same pixels as Pillow."""
    tags = image.tag_v2
    plain = image.mode == "RGB" and set(tags.get(_BITS, ())) == {8} and tags[_PHOTOMETRIC] == _RGB
    return plain and image.width * image.height > _MAX_WHOLE_PIXELS


def _check_work(size: Size, frame: int) -> None:
    pixels = size[0] * size[1] * (frame + 1)
    if pixels > MAX_ANIMATED_PIXELS:
        raise ImageTooLarge(
            f"decoding up to frame {frame + 1} takes {pixels} pixels, "
            f"the limit is {MAX_ANIMATED_PIXELS} pixels"
        )


def _seek(image: Any, frame: int) -> None:
    try:
        image.seek(frame)
    except EOFError as error:
        raise no_frame(frame) from error


# ---------------------------------------------------------------------- frames of GIF
# Found without decoding (GIF89a specification).

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_SCREEN_BYTES = 13
# Blocks have up to 255 bytes, and encoders usually fill them.
_MAX_BLOCKS = 2_000_000


def _has_end(data: bytes) -> bool:
    """Whether the file is complete. Some writers pad files or append other data."""
    if data.rstrip(b"\0\r\n ")[-1:] == bytes((_END,)):
        return True
    try:
        for _ in _gif_frames(data):
            pass
    except InvalidImage:
        return False
    return True


def _gif_frames(data: bytes) -> Iterator[Size]:
    """The extent of each frame from the upper left corner of the screen: (width, height) in pixels.

    Raises:
        InvalidImage: the file ends within a frame, or has an unknown block.
    """
    try:
        yield from _each_gif_frame(data)
    except IndexError:
        raise truncated() from None


def _each_gif_frame(data: bytes) -> Iterator[Size]:
    at = _SCREEN_BYTES + _table_bytes(data[10])
    left = _MAX_BLOCKS
    while left:
        kind = data[at]
        if kind == _END:
            return
        if kind == _EXTENSION:
            at, left = _skip_blocks(data, at + 2, left)
        elif kind == _IMAGE:
            x, y, width, height = (
                int.from_bytes(data[at + i : at + i + 2], "little") for i in (1, 3, 5, 7)
            )
            at, left = _skip_blocks(data, at + 11 + _table_bytes(data[at + 9]), left)
            yield x + width, y + height
        else:
            raise damaged()
    raise damaged()


def _table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int, left: int) -> tuple[int, int]:
    """The offset behind the blocks at `at`, and the number of blocks that may still be read."""
    while data[at] and left:
        at += data[at] + 1
        left -= 1
    return at + 1, max(left - 1, 0)
