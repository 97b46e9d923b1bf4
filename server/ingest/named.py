"""Images that clients have named by a uuid, so that they need not send them again."""

from collections.abc import Sequence
from dataclasses import replace

from blake3 import blake3
from cachetools import LRUCache

from server.errors import UnknownImage
from server.imaging.encoded import EncodedImage

_REMEMBERED = 100_000


class NamedImages:
    """What is known of the images that were sent under a uuid, without their bytes.

    A uuid is a name for bytes that its group has sent, and never a key of a cache.
    """

    def __init__(self) -> None:
        # By the hash of group and uuid: uuids may be long.
        self._images: LRUCache[bytes, EncodedImage] = LRUCache(_REMEMBERED)

    def put(self, group: str, uuid: str, images: Sequence[EncodedImage]) -> None:
        """Remember what `uuid` names; nothing, if that is several images."""
        if len(images) == 1:
            self._images[_key(group, uuid)] = replace(images[0], data=b"", path="")

    def get(self, group: str, uuid: str) -> EncodedImage:
        """Raises UnknownImage if `group` has sent nothing under `uuid`."""
        image = self._images.get(_key(group, uuid))
        if image is None:
            raise UnknownImage("the part has no image data, and its uuid is not known")
        return image


def _key(group: str, uuid: str) -> bytes:
    return blake3(f"{group}\n{uuid}".encode()).digest()
