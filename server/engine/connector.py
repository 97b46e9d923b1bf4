"""Loads image parts as encoded bytes, in the place of vLLM's connector, which would decode them."""

import asyncio
from typing import Any, ClassVar

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

from server.ingest.load import ImageLoader

NAME = "saccade"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class EncodedImageConnector(MediaConnector):
    """Images stay encoded; what else is fetched, such as videos, is vLLM's to decode.

    vLLM makes one for each request that has media, so what it needs beyond vLLM's own arguments
    is set once on the class, by `configure`.
    """

    loader: ClassVar[ImageLoader | None] = None

    @classmethod
    def configure(cls, loader: ImageLoader) -> None:
        """Switch from vLLM's own decoding to encoded images."""
        cls.loader = loader

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The image at a data, http(s) or file URL as an `EncodedImage`.

        Raises:
            ClientError: the URL or the image is refused.
        """
        if self.loader is None:
            return await super().fetch_image_async(image_url, image_mode=image_mode)
        return await self.loader.image(image_url)

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """Media of any kind; over HTTP they are fetched as images are, under the same guard."""
        if self.loader is None or url.partition(":")[0].lower() not in ("http", "https"):
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        data = await self.loader.data(url, media_io.get_max_bytes())
        return await asyncio.to_thread(media_io.load_bytes, data)
