"""Every error that a client can see, and the one shape in which it sees it.

    SaccadeError                 500 internal_error
    +- ClientError               400 invalid_request
    |  +- InvalidImage           400 invalid_image
    |  +- ImageTooLarge          413 image_too_large
    |  +- ImageProcessingTimeout 400 image_processing_timeout
    |  +- ImageFetchFailed       400 image_fetch_failed
    |  +- ImageFetchTimeout      400 image_fetch_timeout
    |  +- UnknownImage           400 unknown_image
    |  +- RequestTooLarge        413 request_too_large
    |  +- RequestTimeout         408 request_timeout
    +- ServerBusy                503 server_busy          (Retry-After)
    +- ImageWorkerDied           500 image_worker_died

Stages raise these; `api.errors` turns them into a response. A stage that calls a library
translates the library's exceptions itself, so that no text of the library's reaches a client.
"""

from typing import Any


class SaccadeError(Exception):
    """An error with an HTTP status, a stable machine-readable code and a public message."""

    status = 500
    code = "internal_error"
    type = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, part: str | None = None) -> None:
        """`part` names the image the error is about as the request does: its URL or its uuid."""
        super().__init__(message)
        self.message = message
        self.part = part


class ClientError(SaccadeError):
    """The request is at fault; sending it again as it is will fail again."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidImage(ClientError):
    code = "invalid_image"


class ImageTooLarge(ClientError):
    status = 413
    code = "image_too_large"


class ImageProcessingTimeout(ClientError):
    code = "image_processing_timeout"


class ImageFetchFailed(ClientError):
    code = "image_fetch_failed"


class ImageFetchTimeout(ClientError):
    code = "image_fetch_timeout"


class UnknownImage(ClientError):
    code = "unknown_image"


class RequestTooLarge(ClientError):
    status = 413
    code = "request_too_large"


class RequestTimeout(ClientError):
    status = 408
    code = "request_timeout"


class ServerBusy(SaccadeError):
    status = 503
    code = "server_busy"
    retry_after_s = 1


class ImageWorkerDied(SaccadeError):
    code = "image_worker_died"


# The errors that an image worker may report by their code.
WORKER_ERRORS: dict[str, type[SaccadeError]] = {
    error.code: error for error in (SaccadeError, InvalidImage, ImageTooLarge)
}


def error_body(
    message: str, type_: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """The OpenAI error object: `{"error": {message, type, param, code}}`."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
