"""Every error that a client can see, and the one shape in which it sees it.

Stages raise these; `http.errors` turns them into a response. A stage that calls a library
translates the library's exceptions itself, so that no text of the library's reaches a client.
The docstring of a class says when it is raised; `python -m server.http.errors` makes the table of
`docs/errors.md` from them.
"""

from collections.abc import Iterator
from typing import Any


class SaccadeError(Exception):
    """Something failed that the request is not to blame for."""

    status = 500
    code = "internal_error"
    type = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """`param` is the path of what is wrong in the request, where it is known."""
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(SaccadeError):
    """The request is not what the API takes; sending it again as it is will fail again."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidImageUrl(ClientError):
    """The URL of an image cannot be used: not base64, an unknown scheme, no host."""

    code = "invalid_image_url"


class InvalidImage(ClientError):
    """The image is empty, truncated or damaged, or not what its header says."""

    code = "invalid_image"


class UnsupportedImageFormat(ClientError):
    """The data is none of the image formats that are opened."""

    code = "unsupported_image_format"


class ImageTooLarge(ClientError):
    """The image has more bytes, pixels or a longer side than the limits allow."""

    status = 413
    code = "image_too_large"


class ImageAspectRatio(ClientError):
    """The image is too long for its width, or too wide for its height."""

    code = "image_aspect_ratio"


class ImageFrameMissing(ClientError):
    """A frame or page was asked for that the file does not have."""

    code = "image_frame_missing"


class ImageProcessingTimeout(ClientError):
    """Decoding and preprocessing the image took too long."""

    code = "image_processing_timeout"


class ImageProcessingFailed(ClientError):
    """The image worker died on the image, on two attempts."""

    code = "image_processing_failed"


class InvalidVideo(ClientError):
    """The video is damaged, has no pictures, or refers to other files for them."""

    code = "invalid_video"


class UnsupportedVideoFormat(ClientError):
    """The data is none of the video formats that are opened."""

    code = "unsupported_video_format"


class VideoTooLarge(ClientError):
    """The video has more bytes or pixels, or its frames take more memory, than the limits allow."""

    status = 413
    code = "video_too_large"


class InvalidAudio(ClientError):
    """The audio clip is damaged, or has no sound."""

    code = "invalid_audio"


class UnsupportedAudioFormat(ClientError):
    """The data is none of the audio formats that are opened."""

    code = "unsupported_audio_format"


class AudioTooLarge(ClientError):
    """The audio clip has more bytes, or takes more memory once decoded, than the limits allow."""

    status = 413
    code = "audio_too_large"


class MediaProcessingTimeout(ClientError):
    """Decoding the video or audio clip took too long."""

    code = "media_processing_timeout"


class MediaProcessingFailed(ClientError):
    """The process that decodes the video or audio clip died on it."""

    code = "media_processing_failed"


class ImageTokenCap(ClientError):
    """The model cannot show the image, or the images, in as few tokens as the cap allows."""

    code = "image_token_cap"


class ImageUrlBlocked(ClientError):
    """The URL leads to an address, a host or a file that this server does not fetch from."""

    code = "image_url_blocked"


class ImageFetchFailed(ClientError):
    """The image's server could not be reached, or did not answer with an image."""

    code = "image_fetch_failed"


class ImageFetchTimeout(ClientError):
    """The image was not fetched before the deadline."""

    code = "image_fetch_timeout"


class UnknownImage(ClientError):
    """The part has only a uuid, under which no image is cached."""

    code = "unknown_image"


class TooManyImages(ClientError):
    """The request has more images, or a file more pages, than the limit allows."""

    code = "too_many_images"


class InvalidFile(ClientError):
    """A PDF is damaged or encrypted, or a file cannot give what its part asks for."""

    code = "invalid_file"


class InvalidApiKey(ClientError):
    """The request has no API key, or none that the server knows."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class AdminKeyRequired(ClientError):
    """The route is for admin keys only, or the server has none."""

    status = 403
    code = "admin_key_required"


class UnknownFile(ClientError):
    """There is no uploaded file with this id: it never was, was deleted, or has expired."""

    status = 404
    code = "file_not_found"


class FilesDisabled(ClientError):
    """The server keeps no uploaded files: it was started without `--files-dir`."""

    status = 404
    code = "files_disabled"


class FileQuotaExceeded(ClientError):
    """The uploaded files would be more, or have more bytes, than the limits allow; delete some."""

    status = 413
    code = "file_quota_exceeded"


class RequestTooLarge(ClientError):
    """The body of the request has more bytes than the limit allows."""

    status = 413
    code = "request_too_large"


class RequestTimeout(ClientError):
    """The body of the request stopped coming."""

    status = 408
    code = "request_timeout"


class ServerBusy(SaccadeError):
    """Too many images wait, or the server is shutting down; try again after `Retry-After`."""

    status = 503
    code = "server_busy"
    retry_after_s = 1


class Unavailable(SaccadeError):
    """The server cannot serve requests now: it is shutting down, its engine has died, or no image
    worker can take work. `/health` and `/ready` say so, and proxies that reach no server."""

    status = 503
    code = "unavailable"


class FileStorageFailed(SaccadeError):
    """The disk with the uploaded files is full, or cannot be read or written."""

    status = 507
    code = "file_storage_failed"


class CannotStart(Exception):
    """A setting that this machine or this model cannot bear; said once, at the start."""


def error_classes(root: type[SaccadeError] = SaccadeError) -> Iterator[type[SaccadeError]]:
    """Every class of error, a class before those derived from it."""
    yield root
    for derived in root.__subclasses__():
        yield from error_classes(derived)


# The errors that an image worker may report by their code.
WORKER_ERRORS: dict[str, type[SaccadeError]] = {
    error.code: error
    for error in (
        SaccadeError,
        InvalidImage,
        UnsupportedImageFormat,
        ImageTooLarge,
        ImageFrameMissing,
        InvalidFile,
    )
}


def error_body(
    message: str, type_: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """The OpenAI error object: `{"error": {message, type, param, code}}`."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


# Codes of errors that vLLM and the framework raise, by their status.
STATUS_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable_request",
    429: "rate_limit_exceeded",
    500: "internal_error",
    501: "not_implemented",
    503: "server_busy",
}
# Every code that is documented.
CODES = frozenset(error.code for error in error_classes()) | frozenset(STATUS_CODES.values())
