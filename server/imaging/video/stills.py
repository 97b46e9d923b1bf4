"""Decodes frames of videos that are pictures: a series, or an animation. For child processes."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.errors import ClientError, ImageTooLarge, InvalidVideo, VideoTooLarge
from server.imaging.decode import DecodeOptions, OpenAnimation, decode
from server.imaging.sizing import Size
from server.imaging.video.pictures import unpack

Frame = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
DecodeFrame = Callable[[int], Image.Image]


def of_pictures(data: bytes, max_pixels: int, background: Color) -> DecodeFrame:
    """Decodes the frames of what `pictures.pack` has made."""
    pictures = unpack(data)
    options = DecodeOptions("RGB", background, max_pixels)
    return lambda index: decode(pictures[index], options).image


def of_animation(data: bytes, max_pixels: int, background: Color) -> DecodeFrame:
    """Decodes the frames of an animation, in ascending order."""
    animation, file = OpenAnimation(), bytes(data)  # it may be a mapping of shared memory

    def frame(index: int) -> Image.Image:
        options = DecodeOptions("RGB", background, max_pixels, index)
        return decode(file, options, animation=animation).image

    return frame


def frames(
    decode_frame: DecodeFrame,
    indices: Sequence[int],
    size: Size,
    target: Size | None = None,
    resize: Callable[[Frame], Frame] | None = None,
) -> Frame:
    """The frames `indices`, ascending, each of (width, height) `size` in pixels. At any time, one
    is held at its full size.

    Args:
        target: (width, height) of the result, which `resize` makes of a frame; None: `size`.

    Returns:
        uint8 (indices, height, width, 3), RGB, upright.

    Raises:
        InvalidVideo: a frame is damaged, does not exist, or is of another size.
        VideoTooLarge
    """
    width, height = target or size
    result = np.empty((len(indices), height, width, 3), np.uint8)
    for place, index in enumerate(indices):
        if place and index == indices[place - 1]:
            result[place] = result[place - 1]
            continue
        frame = _decoded(decode_frame, index, size)
        result[place] = resize(frame) if resize is not None else frame
    return result


def _decoded(decode_frame: DecodeFrame, index: int, size: Size) -> Frame:
    try:
        picture = decode_frame(index)
    except ImageTooLarge as error:
        raise VideoTooLarge(f"frame {index} of the video: {error.message}") from error
    except (ClientError, IndexError) as error:
        raise InvalidVideo(f"frame {index} of the video is damaged") from error
    if picture.size != size:
        raise InvalidVideo("the frames of the video do not have the size in its header")
    return np.asarray(picture)
