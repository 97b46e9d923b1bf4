"""Hands the media of a request to vLLM, in the place of vLLM's connector, which would fetch them.

vLLM asks for media by the URLs in the messages. These are handles of the request's context; their
media are loaded already. Nothing else is loaded: a URL that reaches vLLM stood where no media part
belongs, and is refused.
"""

from typing import Any, ClassVar

from blake3 import blake3
from PIL import Image
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    AudioMediaIO,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
    VideoMediaIO,
)
from vllm.multimodal.video import get_video_loader_backend_for_processor

from server.concurrency import in_thread
from server.engine.clips import check_options, video_options
from server.engine.video_sampling import encoded_video
from server.engine.vllm_adapter.processors import tensor
from server.engine.vllm_adapter.video_loaders import LoaderUnsupported
from server.errors import ClientError, InvalidImageUrl, SaccadeError, UnknownImage
from server.imaging.containers import holds_pictures
from server.imaging.encoded import EncodedImage
from server.imaging.sampling import SamplingOptions
from server.imaging.video.encoded import EncodedVideo
from server.ingest.video import ClipDecoder
from server.request import context as contexts
from server.request.context import Resolved
from server.request.media import MediaRef
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
        clips: where videos and audio clips are decoded.
        encodes_videos: whether videos stay encoded, for a renderer that takes them so.
    """

    pool: ClassVar[ImagePool | None] = None
    clips: ClassVar[ClipDecoder | None] = None
    encodes_videos: ClassVar[bool] = False

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

    async def fetch_video_async(self, video_url: str, **given: Any) -> Any:
        """The video of a handle: an `EncodedVideo`, or the frames and metadata, as vLLM's loader
        has them.

        Raises:
            InvalidImageUrl: it is not a handle.
            ClientError: an option in `media_io_kwargs` is out of range.
            SaccadeError: those of `ClipDecoder`.
        """
        check_options(self.media_io_kwargs.get("video") or {})
        resolved = _resolved(video_url)
        if self.encodes_videos and _is_encoded(resolved.ref):
            video = await _encoded(resolved.ref, self._video_io(**given))
            if video is not None:
                return video
        if resolved.ref.sampling != SamplingOptions():
            raise ClientError(
                "options of a video are supported neither beside a uuid, nor for pictures sent as "
                "a video, nor by all models",
                param=resolved.ref.path,
            )
        return await super().fetch_video_async(video_url, **given)

    def _video_io(
        self, image_mode: str | None = "RGB", video_processor: str | None = None
    ) -> VideoMediaIO:
        """How vLLM would decode a video of this request."""
        images = {"image_mode": image_mode, **(self.media_io_kwargs.get("image") or {})}
        options = dict(self.media_io_kwargs.get("video") or {})
        loader = get_video_loader_backend_for_processor(video_processor)
        if "video_backend" not in options and loader:
            options["video_backend"] = loader
        return VideoMediaIO(ImageMediaIO(**images), **options)

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """The video or the audio clip of a handle, as `media_io` would decode it."""
        ref = _resolved(url).ref
        assert self.clips is not None
        try:
            return await _clip(self.clips, ref.data, media_io)
        except SaccadeError as error:
            error.param = error.param or ref.path
            raise

    def load_from_url(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """Refused: vLLM's servers do not load media in a way that blocks them."""
        raise SaccadeError("media cannot be loaded in this way")


def _is_encoded(ref: MediaRef) -> bool:
    """Whether the video of `ref` can stay encoded, and all others of its request too: those that
    clients name by a uuid are vLLM's, and so are series of pictures."""
    videos = [each for each in contexts.current().media if each.kind == "video"]
    return all(each.video is not None and each.uuid is None for each in (ref, *videos))


async def _encoded(ref: MediaRef, io: VideoMediaIO) -> EncodedVideo | None:
    """The video with the frames that `io` takes of it; None if its loader must decode."""
    try:
        return await in_thread(encoded_video, ref, io)
    except LoaderUnsupported:
        return None


async def _clip(clips: ClipDecoder, data: bytes, media_io: MediaIO[Any]) -> Any:
    if isinstance(media_io, AudioMediaIO):
        return tuple(await clips.load_audio(data, media_io.audio_backend))
    if not isinstance(media_io, VideoMediaIO):
        raise SaccadeError("media of this kind cannot be loaded")
    options = video_options(media_io)
    if holds_pictures(data):
        return MediaWithBytes(tuple(await clips.load_pictures(data, options)), data)
    return MediaWithBytes(tuple(await clips.load_video(data, options)), data)


async def _decoded(pool: ImagePool, image: EncodedImage, io: DecodeIO) -> Image.Image:
    if not image.data:
        raise UnknownImage("this model needs the data of an image each time", param=image.path)
    header, frame = image.header, image.options.frame
    job = PixelsJob(format=header.format, size=image.size, frame=frame, io=io)
    key = f"pixels-{image.digest}-{blake3(encode_job(job)).hexdigest()}"
    try:
        found = await pool.process(key, image.data, job, contexts.current().record)
    except SaccadeError as error:  # all who wait for this image get the same one
        raise type(error)(error.message, param=image.path) from None
    pixels = found.arrays(tensor)["pixels"]
    return await in_thread(lambda: Image.fromarray(pixels.numpy().copy()))


def _resolved(handle: str) -> Resolved:
    found = contexts.current().resolve(handle)
    if found is None:
        raise InvalidImageUrl("media must stand in content parts of messages")
    return found
