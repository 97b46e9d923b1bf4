"""Every error that a client can receive, and the shape of its body.

Stages raise these; `http.errors` turns them into responses. A stage that calls a library translates
the library's exceptions itself, so that the library's texts never reach a client. The docstring of
a class says when it is raised; `python -m server.http.errors` builds the table in `docs/errors.md`
from them.
"""

import errno
from collections.abc import Collection, Iterator
from typing import Any


class SaccadeError(Exception):
    """The server failed; the request is not at fault."""

    status = 500
    code = "internal_error"
    type = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """`param` is the path of the wrong value in the request, if it is known."""
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(SaccadeError):
    """The request is invalid; the same request would fail again."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidImageUrl(ClientError):
    """The image URL is unusable: invalid base64, an unknown scheme, or no host."""

    code = "invalid_image_url"


class InvalidImage(ClientError):
    """The image is empty, truncated or damaged, or contradicts its header."""

    code = "invalid_image"


class UnsupportedImageFormat(ClientError):
    """The data is not in a supported image format."""

    code = "unsupported_image_format"


class ImageTooLarge(ClientError):
    """The image exceeds the limit on bytes, on pixels or on the length of a side."""

    status = 413
    code = "image_too_large"


class ImageAspectRatio(ClientError):
    """The ratio of the image's longer side to its shorter side exceeds the limit."""

    code = "image_aspect_ratio"


class ImageFrameMissing(ClientError):
    """The file does not have the requested frame or page."""

    code = "image_frame_missing"


class ImageProcessingTimeout(ClientError):
    """Decoding and preprocessing the image took too long."""

    code = "image_processing_timeout"


class ImageProcessingFailed(ClientError):
    """The image worker crashed while it processed the image, and so did, or was lost, the one
    before it."""

    code = "image_processing_failed"


class InvalidVideo(ClientError):
    """The video is damaged, has no frames, or refers to other files."""

    code = "invalid_video"


class UnsupportedVideoFormat(ClientError):
    """The data is not in a supported video format."""

    code = "unsupported_video_format"


class VideoTooLarge(ClientError):
    """The video exceeds a limit: on bytes, pixels, seconds, frames, or memory."""

    status = 413
    code = "video_too_large"


class InvalidAudio(ClientError):
    """The audio clip is damaged or has no sound."""

    code = "invalid_audio"


class UnsupportedAudioFormat(ClientError):
    """The data is not in a supported audio format."""

    code = "unsupported_audio_format"


class AudioTooLarge(ClientError):
    """The audio clip exceeds the limit on bytes, or on memory once decoded."""

    status = 413
    code = "audio_too_large"


class MediaProcessingTimeout(ClientError):
    """Decoding the video or audio clip took too long."""

    code = "media_processing_timeout"


class MediaProcessingFailed(ClientError):
    """The process that decoded the video or audio clip died, or the second one was killed for
    memory."""

    code = "media_processing_failed"


class ImageTokenCap(ClientError):
    """The model needs more tokens for the image, or for all images, than the cap allows."""

    code = "image_token_cap"


class ImageUrlBlocked(ClientError):
    """The URL points to an address, a host or a file that this server may not read."""

    code = "image_url_blocked"


class ImageFetchFailed(ClientError):
    """The image's server could not be reached, or did not send an image."""

    code = "image_fetch_failed"


class ImageFetchTimeout(ClientError):
    """The image was not fetched before the deadline."""

    code = "image_fetch_timeout"


class PdfTooComplex(ClientError):
    """A page of the PDF takes too much time or memory to read or to render."""

    code = "pdf_too_complex"


class UnknownImage(ClientError):
    """The part has only a uuid, and no image or video is known under it."""

    code = "unknown_image"


class TooManyImages(ClientError):
    """The request has more images, or a file more pages or frames, than the limit allows."""

    code = "too_many_images"


class InvalidFile(ClientError):
    """A PDF is damaged or encrypted, or the options of a part do not fit its file."""

    code = "invalid_file"


class InvalidApiKey(ClientError):
    """The request has no API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class AdminKeyRequired(ClientError):
    """The route needs an admin key: the request has none, or the server has none."""

    status = 403
    code = "admin_key_required"


class ScopeMissing(ClientError):
    """The scopes of the API key do not include what the route does."""

    status = 403
    code = "scope_missing"


class UnknownFile(ClientError):
    """No uploaded file has this id: it never existed, was deleted, or has expired."""

    status = 404
    code = "file_not_found"


class FilesDisabled(ClientError):
    """The Files API is off: the server was started with `--no-files`, or cannot use the folder of
    `--files-dir`."""

    status = 404
    code = "files_disabled"


class FileQuotaExceeded(ClientError):
    """The upload would exceed the limit on files or on their bytes; delete some files first."""

    status = 413
    code = "file_quota_exceeded"


class BatchTooLarge(ClientError):
    """The input file of a batch has more bytes than the limit allows."""

    status = 413
    code = "batch_too_large"


class UnknownBatch(ClientError):
    """No batch has this id: it never existed, or is one of the oldest of many."""

    status = 404
    code = "batch_not_found"


class BatchNotCancellable(ClientError):
    """The batch is over, or its results are being written."""

    status = 409
    code = "batch_not_cancellable"


class BatchQuotaExceeded(ClientError):
    """The group has as many unfinished batches as the limit allows; wait until one is over."""

    status = 429
    type = "rate_limit_error"
    code = "batch_quota_exceeded"


class RequestTooLarge(ClientError):
    """The request body has more bytes than the limit allows."""

    status = 413
    code = "request_too_large"


class UrlTooLong(ClientError):
    """The URL has more bytes than the limit allows."""

    status = 414
    code = "url_too_long"


class HeadersTooLarge(ClientError):
    """The headers have more bytes, or are more, than the limits allow."""

    status = 431
    code = "headers_too_large"


class RequestTooComplex(ClientError):
    """The request body has too many JSON values, levels of nesting, or messages, content parts,
    tools and other items."""

    code = "request_too_complex"


class TooManyAnswers(ClientError):
    """The request has more prompts, times `n`, than `--max-num-queued-reqs` allows at a time."""

    code = "too_many_answers"


class RequestTimeout(ClientError):
    """The headers did not arrive in time, or the request body stopped arriving."""

    status = 408
    code = "request_timeout"


class RateLimited(ClientError):
    """The API key, or its group, is over one of its limits; retry after `Retry-After`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1


class DeadlineExceeded(ClientError):
    """The deadline of the request passed while it was worked on."""

    status = 408
    code = "deadline_exceeded"


class ServerBusy(SaccadeError):
    """Too many requests, images, clips or connections wait, or the request would wait too long, or
    the server is shutting down; retry after `Retry-After`."""

    status = 503
    code = "server_busy"
    retry_after_s = 1


class BodyMemoryFull(ServerBusy):
    """The bodies of other requests take all of `--request-memory-gb`; retry after
    `Retry-After`."""

    code = "body_memory_full"


class MediaMemoryFull(ServerBusy):
    """The images and clips of running requests take all of `--media-memory-gb`; retry after
    `Retry-After`."""

    code = "media_memory_full"


class ImageTokensFull(ServerBusy):
    """Running requests have `--max-running-image-tokens`; retry after `Retry-After`."""

    code = "image_tokens_full"


class ImageQueueFull(ServerBusy):
    """`--image-queue` images wait for a worker; retry after `Retry-After`."""

    code = "image_queue_full"


class EngineQueueFull(ServerBusy):
    """The engine has as many requests as `--max-num-queued-reqs` or `--max-num-queued-tokens`
    allows; retry after `Retry-After`."""

    code = "engine_queue_full"


class WorkerLost(SaccadeError):
    """The processes that worked for the request were killed or stopped, on both attempts, or no
    image worker is up because they die again and again; retry after `Retry-After`."""

    status = 503
    code = "worker_lost"
    retry_after_s = 1


class Unavailable(SaccadeError):
    """The server cannot serve requests: it is shutting down, its engine has died or does not
    answer, or no image worker is available. `/health` and `/ready` return this, and proxies that
    reach no server."""

    status = 503
    code = "unavailable"
    retry_after_s = 5


class FileStorageFailed(SaccadeError):
    """The disk with the uploaded files, or with the temporary files of uploads, is full, or cannot
    be read or written."""

    status = 507
    code = "file_storage_failed"


_NO_FILES = (errno.EMFILE, errno.ENFILE)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def busy_for_files(error: BaseException | None) -> ServerBusy | None:
    """The error to raise if `error`, or what caused it, is that no more files can be opened, which
    passes when other requests end."""
    if _is_caused_by(error, _NO_FILES):
        return ServerBusy("the server has no free file descriptors; try again later")
    return None


def full_disk(error: BaseException | None) -> FileStorageFailed | None:
    """The error to raise if `error`, or what caused it, is that a disk is full."""
    if _is_caused_by(error, _NO_ROOM):
        return FileStorageFailed("the server's disk is full")
    return None


def _is_caused_by(error: BaseException | None, numbers: Collection[int]) -> bool:
    """Whether `error`, or what caused it, is an OSError with one of `numbers`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        error = error.__cause__ or error.__context__
    return False


class CannotStart(Exception):
    """The server cannot start with these settings on this machine or with this model."""


class CannotPlan(Exception):
    """The planner cannot tell what this model costs."""


def error_classes(root: type[SaccadeError] = SaccadeError) -> Iterator[type[SaccadeError]]:
    """Yield every error class, each before its subclasses."""
    yield root
    for derived in root.__subclasses__():
        yield from error_classes(derived)


# The errors that an image worker may report, by code.
WORKER_ERRORS: dict[str, type[SaccadeError]] = {
    error.code: error
    for error in (
        SaccadeError,
        InvalidImage,
        UnsupportedImageFormat,
        ImageTooLarge,
        ImageFrameMissing,
        InvalidFile,
        PdfTooComplex,
    )
}


def error_body(
    message: str, type_: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """The OpenAI error object: `{"error": {message, type, param, code}}`."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


# OpenCV, torch and libvips have no classes for this.
_RAN_OUT = ("allocate", "insufficient memory", "not enough memory", "out of memory")


def ran_out(error: Exception) -> bool:
    """Whether memory ran out in a library."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _RAN_OUT)


# Codes for the errors of vLLM and of the framework, by HTTP status.
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
# All documented codes.
CODES = frozenset(error.code for error in error_classes()) | frozenset(STATUS_CODES.values())
