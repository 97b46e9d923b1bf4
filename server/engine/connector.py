"""Hands the media of a request to vLLM, in the place of vLLM's connector, which would fetch them.

vLLM asks for media by the URLs in the messages. These are handles of the request's context; their
media are loaded already. Nothing else is loaded: a URL that reaches vLLM stood where no media part
belongs, and is refused.
"""

import asyncio
from typing import Any, ClassVar

from blake3 import blake3
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

from server.engine.vllm_adapter.processors import tensor
from server.errors import InvalidImageUrl, SaccadeError, UnknownImage
from server.imaging.encoded import EncodedImage
from server.request import context as contexts
from server.request.context import Resolved
from server.tasks import in_thread
from server.workers.jobs import DecodeIO, PixelsJob, encode_job
from server.workers.pool import ImagePool

NAME = "saccade"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class HandleConnector(MediaConnector):
    """vLLM makes one for each request that has media, so what it needs beyond vLLM's own arguments
    is set once on the class.

    Attributes:
        pool: where images are decoded, for a renderer that takes pixels; None: they stay encoded,
            for a renderer that takes them so.
    """

    pool: ClassVar[ImagePool | None] = None

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The image of a handle: an `EncodedImage`, or a Pillow image of `image_mode`.

        Raises:
            InvalidImageUrl: it is not a handle.
            UnknownImage: it was only named by its uuid, and there are no bytes to decode.
            SaccadeError: those of `ImagePool.process`.
        """
        image = _resolved(image_url).image
        if self.pool is None or image is None:
            return image
        given = {"image_mode": image_mode, **(self.media_io_kwargs.get("image") or {})}
        return await _decoded(self.pool, image, DecodeIO.of(given))

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


async def _decoded(pool: ImagePool, image: EncodedImage, io: DecodeIO) -> Image.Image:
    if not image.data:
        raise UnknownImage("this model needs the data of an image each time", param=image.path)
    header, frame = image.header, image.options.frame
    job = PixelsJob(format=header.format, size=image.size, frame=frame, io=io)
    key = f"pixels-{image.digest}-{blake3(encode_job(job)).hexdigest()}"
    try:
        found = await pool.process(key, image.data, job, contexts.current().record.timeline)
    except SaccadeError as error:  # all who wait for this image get the same one
        raise type(error)(error.message, param=image.path) from None
    pixels = found.arrays(tensor)["pixels"]
    return await in_thread(lambda: Image.fromarray(pixels.numpy().copy()))


def _resolved(handle: str) -> Resolved:
    found = contexts.current().resolve(handle)
    if found is None:
        raise InvalidImageUrl("media must stand in content parts of messages")
    return found


def _bytes(handle: str) -> bytes:
    ref, image = _resolved(handle)
    return ref.data if image is None else image.data
