"""Hands the media of a request to vLLM, in the place of vLLM's connector, which would fetch them.

vLLM asks for media by the URLs in the messages. These are handles of the request's context; their
media are loaded already. Nothing else is loaded: a URL that reaches vLLM stood where no media part
belongs, and is refused.
"""

import asyncio
from typing import Any, ClassVar

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

from server.errors import InvalidImageUrl
from server.request import context as contexts
from server.request.context import Resolved

NAME = "saccade"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class HandleConnector(MediaConnector):
    """vLLM makes one for each request that has media, so what it needs beyond vLLM's own arguments
    is set once on the class."""

    keeps_encoded: ClassVar[bool] = False
    """Whether images stay encoded, for a renderer that takes them so."""

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The image of a handle, as an `EncodedImage` or decoded by vLLM.

        Raises:
            InvalidImageUrl: it is not a handle.
        """
        if self.keeps_encoded:
            return _resolved(image_url).image
        return await super().fetch_image_async(image_url, image_mode=image_mode)

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """Media of any kind, decoded by vLLM."""
        return await asyncio.to_thread(media_io.load_bytes, _bytes(url))

    def load_from_url(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """The same for callers that block."""
        return media_io.load_bytes(_bytes(url))


def _resolved(handle: str) -> Resolved:
    found = contexts.current().resolve(handle)
    if found is None:
        raise InvalidImageUrl("media must stand in content parts of messages")
    return found


def _bytes(handle: str) -> bytes:
    ref, image = _resolved(handle)
    return ref.data if image is None else image.data
