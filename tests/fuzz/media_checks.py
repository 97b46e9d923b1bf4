"""Decodes a hostile file as an image worker does, and checks how it is refused."""

import re
import warnings

from server.errors import ClientError
from server.imaging import pdf
from server.imaging.decode import DecodeOptions, decode, frame_count
from server.ingest.expand import is_pdf
from server.workers.work_limit import WorkLimit

MAX_PIXELS = 1_000_000
_PAGE = WorkLimit(5.0, 512 << 20)
# Errors are sentences of this project: no library's text, path, object or number of an address.
_MESSAGE = re.compile(r"(the|frame|TIFF|a page) [\w ',:;/()=.-]+\Z")


def is_decoded(data: bytes) -> bool:
    """Whether `data` is decoded rather than refused.

    Raises:
        Exception: a decoder raised anything but a client error.
        ValueError: the error's text is not this project's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _decode(data)
    except ClientError as error:
        if not _MESSAGE.match(error.message):
            raise ValueError(f"odd message: {error.message}") from error
        return False
    return True


def _decode(data: bytes) -> None:
    if is_pdf(data):
        with _PAGE.enforced(lambda: None):
            pdf.page_sizes(data, 4)
            pdf.render(data, 0, (60, 60))
        return
    count = frame_count(data)
    decode(data, DecodeOptions(max_pixels=MAX_PIXELS), lambda width, height: (9, 7))
    for frame in {0, count - 1}:
        for mode in ("RGB", None):
            decode(data, DecodeOptions(mode, max_pixels=MAX_PIXELS, frame=frame))
