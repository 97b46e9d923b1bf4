"""Hands the media of a request to vLLM, in the place of vLLM's connector, which would fetch them.

vLLM asks for media by the URLs in the messages. These are handles of the request's context; their
media are loaded already. Nothing else is loaded: a URL that reaches vLLM stood where no media part
belongs, and is refused.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from blake3 import blake3
from PIL import Image
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    AudioMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
    VideoMediaIO,
)
from vllm.multimodal.video import get_video_loader_backend_for_processor

from server.concurrency import in_thread
from server.engine.clips import check_options, video_options
from server.engine.video_sampling import encoded_video
from server.engine.vllm_adapter.levels import Modality, as_item
from server.engine.vllm_adapter.processors import tensor
from server.engine.vllm_adapter.video_loaders import LoaderUnsupported
from server.errors import (
    ClientError,
    InvalidImageUrl,
    SaccadeError,
    UnknownImage,
    UnsupportedVideoFormat,
)
from server.imaging.encoded import EncodedImage
from server.imaging.sampling import SamplingOptions
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
        modality: what the model's processor calls an image.
        clips: where videos and audio clips are decoded.
        encodes_videos: whether videos stay encoded, for a renderer that takes them so.
        max_shown_frames: frames of a video that the model may get.
        max_video_tokens: the server's cap for the tokens of a video.
    """

    pool: ClassVar[ImagePool | None] = None
    modality: ClassVar[Modality] = "image"
    clips: ClassVar[ClipDecoder | None] = None
    encodes_videos: ClassVar[bool] = False
    max_shown_frames: ClassVar[int] = 1
    max_video_tokens: ClassVar[int | None] = None

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The image of a handle: an `EncodedImage`, or a Pillow image of `image_mode`.

        Raises:
            InvalidImageUrl: it is not a handle.
            UnknownImage: it was only named by its uuid, and there are no bytes to decode.
            SaccadeError: those of `ImagePool.process`.
        """
        ref, image = _resolved(image_url)
        if ref.kind == "video":
            raise ClientError("this model takes no video here", param=ref.path)
        if self.pool is None or image is None:
            return as_item(self.modality, image)
        given = {"image_mode": image_mode, **(self.media_io_kwargs.get("image") or {})}
        return await _decoded(self.pool, image, DecodeIO.of(given))

    async def fetch_video_async(self, video_url: str, **given: Any) -> Any:
        """The video of a handle: an `EncodedVideo`, or the frames and metadata, as vLLM's loader
        has them; None if it is only named by its uuid, which vLLM knows then.

        Raises:
            InvalidImageUrl: it is not a handle.
            ClientError: an option in `media_io_kwargs` is out of range.
            SaccadeError: those of `ClipDecoder`.
        """
        options = self.media_io_kwargs.get("video") or {}
        check_options(options, self.max_shown_frames)
        ref = _resolved(video_url).ref
        if self.encodes_videos:
            processor, most = given.get("video_processor"), self.max_shown_frames
            try:
                return await in_thread(encoded_video, ref, options, processor, most)
            except LoaderUnsupported:
                _check_own_loader(options, processor)
        self._check_uncapped(ref)
        return await super().fetch_video_async(video_url, **given) if ref.data else None

    def _check_uncapped(self, ref: MediaRef) -> None:
        """Refuse caps and options of a video that vLLM preprocesses, which knows none of them."""
        why = "which this model does not support"
        if ref.sampling != SamplingOptions():
            raise ClientError(f"the part has options of a video, {why}", param=ref.path)
        if contexts.current().max_image_tokens is not None:
            raise ClientError(
                f"max_image_tokens limits the tokens of videos, {why}", param="max_image_tokens"
            )
        if self.max_video_tokens is not None:
            raise ClientError(f"the server limits the tokens of videos, {why}", param=ref.path)

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """The video or the audio clip of a handle, as `media_io` would decode it."""
        ref = _resolved(url).ref
        assert self.clips is not None
        try:
            return await _clip(self.clips, ref, media_io)
        except SaccadeError as error:
            error.param = error.param or ref.path
            raise

    def load_from_url(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """Refused: vLLM's servers do not load media in a way that blocks them."""
        raise SaccadeError("media cannot be loaded in this way")


def _check_own_loader(options: Mapping[str, Any], video_processor: str | None) -> None:
    """Refuse a loader of another model that reads files itself: this model's processor takes not
    all that it tells. Raises ClientError."""
    asked = options.get("video_backend")
    if asked not in (None, get_video_loader_backend_for_processor(video_processor)):
        path = "media_io_kwargs.video.video_backend"
        raise ClientError(f"{path} must be a loader that suits this model", param=path)


async def _clip(clips: ClipDecoder, ref: MediaRef, media_io: MediaIO[Any]) -> Any:
    data, form = ref.data, ref.video.form if ref.video is not None else None
    if isinstance(media_io, AudioMediaIO):
        return tuple(await clips.load_audio(data, media_io.audio_backend))
    if not isinstance(media_io, VideoMediaIO):
        raise SaccadeError("media of this kind cannot be loaded")
    if form == "animation":
        raise UnsupportedVideoFormat("this model takes no animated picture as a video")
    options = video_options(media_io)
    if form == "pictures":
        return MediaWithBytes(tuple(await clips.load_pictures(data, options)), data)
    return MediaWithBytes(tuple(await clips.load_video(data, options)), data)


async def _decoded(pool: ImagePool, image: EncodedImage, io: DecodeIO) -> Image.Image:
    if not image.data:
        raise UnknownImage("this model needs the data of an image each time", param=image.path)
    header, frame = image.header, image.options.frame
    crop = image.options.crop.box if image.options.crop is not None else None
    job = PixelsJob(format=header.format, size=header.size, frame=frame, io=io, crop=crop)
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
