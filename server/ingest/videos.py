"""What a video is that a request has sent: a file, an animation, or a series of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3
from cachetools import LRUCache

from server.errors import ClientError, InvalidVideo, UnknownImage
from server.imaging import header as image_headers
from server.imaging.containers import has_video_container
from server.imaging.encoded import digest
from server.imaging.video import animation, pictures
from server.imaging.video import header as headers
from server.imaging.video.header import VideoHeader
from server.imaging.video.limits import VideoLimits

# The headers of videos that clients may name by uuid without sending them again: their times take
# most of it.
_REMEMBERED_BYTES = 32 << 20
_ENTRY_BYTES = 1024
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


class NamedVideos:
    """The videos that were sent under a uuid, without their files.

    A uuid names bytes that the same group has sent; it is never used as the key of a cache.
    """

    def __init__(self) -> None:
        self._videos: LRUCache[bytes, LoadedVideo]
        self._videos = LRUCache(_REMEMBERED_BYTES, getsizeof=_size_of)

    def put(self, group: str, uuid: str, video: LoadedVideo) -> None:
        """Remember the video that `uuid` names, unless its header is too large."""
        named = LoadedVideo(b"", video.digest, video.header)
        if _size_of(named) <= self._videos.maxsize:
            self._videos[key_of(group, uuid)] = named

    def get(self, group: str, uuid: str) -> LoadedVideo:
        """Raises UnknownImage if `group` has sent nothing under `uuid`."""
        video = self._videos.get(key_of(group, uuid))
        if video is None:
            raise UnknownImage("the part has no video, and its uuid is unknown")
        return video


def _size_of(video: LoadedVideo) -> int:
    return _ENTRY_BYTES + video.header.times.nbytes


def key_of(group: str, uuid: str) -> bytes:
    """The key of a uuid, which may be long, in a group of API keys."""
    return blake3(f"{group}\n{uuid}".encode()).digest()
