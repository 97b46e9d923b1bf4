"""The body of a response: read under a limit of bytes, and inflated."""

import asyncio
import contextlib
import io
import zlib

import h11

from server.errors import ImageFetchFailed, ImageTooLarge
from server.ingest.connection import Connection

# Parsing takes as long for a piece of one byte as for one of thousands, and is done on the loop.
MIN_PIECE_BYTES = 256
FREE_PIECES = 1024
PIECES_A_TURN = 64

FAILURES = (OSError, h11.RemoteProtocolError)
"""What a connection raises."""


async def read_body(connection: Connection, max_bytes: int) -> bytes:
    """The body of the response whose head `connection` has given.

    Raises:
        ImageFetchFailed, ImageTooLarge
    """
    # Grows in place and gives its bytes out uncopied; joining pieces would copy them on the loop.
    body, size, pieces = io.BytesIO(), 0, 0
    try:
        async with contextlib.aclosing(connection.body()) as stream:
            async for piece in stream:
                size, pieces = size + len(piece), pieces + 1
                if size > max_bytes:
                    raise too_large(max_bytes)
                if pieces > FREE_PIECES + size // MIN_PIECE_BYTES:
                    raise ImageFetchFailed("the image's server sent it in too many small pieces")
                if pieces % PIECES_A_TURN == 0:
                    await asyncio.sleep(0)
                body.write(piece)
    except FAILURES:
        raise ImageFetchFailed("the image's server broke off in the middle of the image") from None
    return body.getvalue()


def inflated(data: bytes, max_bytes: int) -> bytes:
    """`data` without gzip or zlib. Some stores serve what was uploaded so to everyone.

    Raises:
        ImageFetchFailed, ImageTooLarge
    """
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        plain = b""
    if len(plain) > max_bytes:
        raise too_large(max_bytes)
    if not inflater.eof:
        raise ImageFetchFailed("the image's server compressed it wrongly")
    return plain


def too_large(max_bytes: int) -> ImageTooLarge:
    """The error of a body of more than `max_bytes`."""
    return ImageTooLarge(f"the image has more than {max_bytes} bytes, which is the limit")
