"""Loads image parts as encoded bytes, in the place of vLLM's connector, which would decode them."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from vllm import envs
from vllm.exceptions import VLLMClientError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

from server.config import Settings
from server.errors import ClientError, ImageFetchFailed, ImageFetchTimeout
from server.media import payloads
from server.media.payloads import EncodedImage

NAME = "saccade"
# base64 and hashing let go of the GIL; more threads than this only wait for memory.
_threads = ThreadPoolExecutor(4, "image-load")


class _Bytes(MediaIO[bytes]):
    """Leaves what was loaded as it is."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def get_max_bytes(self) -> int:
        return self._max_bytes

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        raise NotImplementedError  # data URLs are decoded by `media.payloads`

    def load_file(self, filepath: Path) -> bytes:
        if filepath.stat().st_size > self._max_bytes:
            raise payloads.too_large(filepath.stat().st_size, self._max_bytes, str(filepath))
        return filepath.read_bytes()


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class EncodedImageConnector(MediaConnector):
    """Images stay encoded; everything else is vLLM's.

    vLLM makes one for each request that has media, so what it needs beyond vLLM's own arguments
    is set once on the class, by `configure`.
    """

    settings: ClassVar[Settings | None] = None

    @classmethod
    def configure(cls, settings: Settings) -> None:
        """Switch from vLLM's own decoding to encoded images."""
        cls.settings = settings

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The image at a data, http(s) or file URL as an `EncodedImage`.

        Raises:
            InvalidImage, ImageTooLarge, ImageFetchFailed, ImageFetchTimeout
        """
        if self.settings is None:
            return await super().fetch_image_async(image_url, image_mode=image_mode)
        max_bytes = self.settings.images.max_image_bytes
        if image_url[:5].lower() == "data:":
            if payloads.is_small(image_url):
                return payloads.load_data_url(image_url, max_bytes)
            return await _in_thread(payloads.load_data_url, image_url, max_bytes)
        data = await self._fetch(image_url, max_bytes, self.settings.http.fetch_timeout_s)
        return await _in_thread(payloads.encoded, data, max_bytes, image_url)

    async def _fetch(self, url: str, max_bytes: int, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.load_from_url_async(
                    url, _Bytes(max_bytes), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
                )
        except TimeoutError:
            message = f"the image was not fetched within {timeout_s:g} s"
            raise ImageFetchTimeout(message, part=url) from None
        except ClientError as error:
            error.part = url
            raise
        except (VLLMClientError, ValueError) as error:
            raise ImageFetchFailed(_refusal(url, error), part=url) from error
        except Exception as error:  # whatever the HTTP client or the file system says
            raise ImageFetchFailed("the image could not be fetched", part=url) from error


def _refusal(url: str, error: Exception) -> str:
    text = str(error)
    if url.lower().startswith("file:"):
        return "the file is not below --allowed-local-media-path"
    if "allowed domains" in text:
        return "the host of the image URL is not among --allowed-media-domains"
    if "must be either a HTTP" in text:
        return "the image URL must be a data, http, https or file URL"
    return "the image could not be fetched"


async def _in_thread(load: Any, *args: Any) -> EncodedImage:
    """Run `load` in a thread, within the context of the request."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    result: EncodedImage = await loop.run_in_executor(_threads, context.run, load, *args)
    return result
