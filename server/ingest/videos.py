"""What a video is that a request has sent: a file, an animation, or a series of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.errors import ClientError, InvalidVideo
from server.imaging import header as image_headers
from server.imaging.containers import has_video_container
from server.imaging.encoded import digest
from server.imaging.video import animation, pictures
from server.imaging.video import header as headers
from server.imaging.video.header import VideoHeader
from server.imaging.video.limits import VideoLimits

_ANIMATED = ("GIF", "WEBP")


@dataclass(frozen=True)
class LoadedVideo:
    """A video of a request: its file, which is empty if it was only named, the hash of the file,
    and its header."""

    data: bytes = field(repr=False)
    digest: str
    header: VideoHeader


def of_file(data: bytes, limits: VideoLimits) -> LoadedVideo:
    """The video in a file: a container, an animated GIF or WebP picture, or a picture, which is one
    frame. The time grows with the file.

    Raises:
        UnsupportedVideoFormat, InvalidVideo, VideoTooLarge
    """
    if not image_headers.is_known(data):
        header = headers.read(data)
    elif _is_animated(data):
        header = animation.read(data)
    else:
        return of_pictures([data], limits)
    limits.check(header)
    return LoadedVideo(data, digest(data), header)


def of_pictures(files: Sequence[bytes], limits: VideoLimits) -> LoadedVideo:
    """The video whose frames are these pictures. The time grows with them.

    Raises:
        InvalidVideo, VideoTooLarge
    """
    header = pictures.read(files)
    limits.check(header)
    data = pictures.pack(files)
    return LoadedVideo(data, digest(data), header)


def is_video(data: bytes) -> bool:
    """Whether `data` is in a container of videos, and is no picture in one."""
    return has_video_container(data) and not image_headers.is_known(data)


def _is_animated(picture: bytes) -> bool:
    """Raises InvalidVideo if the picture is damaged."""
    try:
        header = image_headers.read(picture)
        return header.animated and header.format in _ANIMATED
    except ClientError as error:
        raise InvalidVideo(f"the picture sent as a video: {error.message}") from None
