"""What clients have sent under a uuid, without its bytes, so that they may name it again.

A uuid names bytes that the same group of API keys has sent; it is never used as the key of a cache.
"""

from collections.abc import Sequence
from dataclasses import replace

from blake3 import blake3
from cachetools import LRUCache

from server.errors import UnknownImage
from server.imaging.encoded import EncodedImage
from server.ingest.videos import LoadedVideo

# Most images that clients may name by uuid without sending them again.
_REMEMBERED_NAMES = 100_000
# The headers of videos that clients may name by uuid: their times take most of it.
_REMEMBERED_BYTES = 32 << 20
_ENTRY_BYTES = 1024


class NamedImages:
    """The images that were sent under a uuid, without their bytes."""

    def __init__(self) -> None:
        # By the hash of group and uuid: uuids may be long.
        self._images: LRUCache[bytes, EncodedImage] = LRUCache(_REMEMBERED_NAMES)

    def put(self, group: str, uuid: str, images: Sequence[EncodedImage]) -> None:
        """Remember the image that `uuid` names, unless it names several."""
        if len(images) == 1:
            self._images[key_of(group, uuid)] = replace(images[0], data=b"", path="")

    def get(self, group: str, uuid: str) -> EncodedImage:
        """Raises UnknownImage if `group` has sent nothing under `uuid`."""
        image = self._images.get(key_of(group, uuid))
        if image is None:
            raise UnknownImage("the part has no image data, and its uuid is unknown")
        return image


class NamedVideos:
    """The videos that were sent under a uuid, without their files."""

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
