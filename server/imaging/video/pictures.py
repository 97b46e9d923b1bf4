"""Videos that are sent as a series of pictures."""

from collections.abc import Sequence

import msgspec
import numpy as np

from server.errors import ClientError, InvalidVideo
from server.imaging import header as headers
from server.imaging.video.header import VideoHeader

_decoder = msgspec.msgpack.Decoder(list[bytes])


def pack(pictures: Sequence[bytes]) -> bytes:
    """The files of pictures as one file. Only this server makes and reads such files."""
    return msgspec.msgpack.encode(pictures)


def unpack(data: bytes) -> list[bytes]:
    """The inverse of `pack`. The time grows with the files."""
    return _decoder.decode(data)


def read(pictures: Sequence[bytes]) -> VideoHeader:
    """The header of a video with these frames, one in each second.

    Raises:
        InvalidVideo: a picture is damaged or of no supported format, or differs in size.
    """
    if not pictures:
        raise InvalidVideo("the video has no frames")
    sizes = [_size(picture, number) for number, picture in enumerate(pictures)]
    other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        shown, first = (f"{width}x{height}" for width, height in (sizes[other], sizes[0]))
        raise InvalidVideo(f"frame {other} of the video has {shown} pixels and frame 0 has {first}")
    times = np.arange(len(pictures), dtype=np.float64)
    return VideoHeader("pictures", None, sizes[0], 0, times, float(len(pictures)))


def _size(picture: bytes, number: int) -> tuple[int, int]:
    try:
        return headers.read(picture).size
    except ClientError as error:
        raise InvalidVideo(f"frame {number} of the video: {error.message}") from None
