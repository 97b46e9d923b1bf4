"""From the JSON of a body to a request: its options, and a reference for each of its media parts.

body -> payloads out -> JSON -> options, parts of the dialect -> RequestContext + Found
(the media are loaded) -> a handle for each image in the place of its part -> body for the route
"""

import secrets
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.errors import ClientError, RequestTooLarge, TooManyImages
from server.request.context import RequestContext
from server.request.dialects import Dialect, Found
from server.request.dialects.base import counted_as
from server.request.media import MediaLimits, MediaRef
from server.request.options import is_positive
from server.request.payloads import Payloads, parse
from server.telemetry.record import Record

_HANDLE_BYTES = 16


@dataclass
class ReadRequest:
    """A request that was read, and what is needed to write its body for the route."""

    context: RequestContext
    body: bytes
    document: Any
    found: Found
    payloads: Payloads
    changed: bool

    def rewritten(self) -> bytes:
        """The body for the route: a handle in the place of each image and clip, which the context
        resolves from now on. Call it when the media are loaded.

        Raises:
            ClientError: the document cannot be written as JSON again.
        """
        if not (self.changed or self.found.changed or self.found.slots):
            return self.body
        self.found.fill(self._handles)
        try:
            document = msgspec.json.encode(self.document)
        except OverflowError:  # an integer of more than 64 bits
            raise ClientError("the request body has an integer out of range") from None
        except RecursionError:  # it was read with a less deep stack
            raise ClientError("the request body is nested too deeply") from None
        return self.payloads.restored(document)

    def _handles(self, ref: MediaRef) -> list[str]:
        handles = [f"media-{secrets.token_hex(_HANDLE_BYTES)}" for _ in ref.images or (None,)]
        for handle, image in zip(handles, ref.images or (None,), strict=True):
            self.context.bind(handle, ref, image)
        return handles


class RequestReader:
    """Reads bodies under the limits of the server and of the model."""

    def __init__(
        self, limits: MediaLimits | None, embeddings: frozenset[str], max_json_bytes: int
    ) -> None:
        """`limits` is None where the model takes no media at all. `embeddings` are the types of
        parts with embeddings that the server takes."""
        self._limits = limits
        self._embeddings = embeddings
        self._max_json_bytes = max_json_bytes

    def read(self, body: bytes, dialect: Dialect, record: Record) -> ReadRequest:
        """Read a JSON body. Its time grows with the body.

        Raises:
            RequestTooLarge: too much is left when the payloads are taken out.
            ClientError: it is not JSON, or a part or an option is wrong; `param` names it.
            TooManyImages: more media than the limits allow.
        """
        payloads = Payloads(body)
        self._check_size(len(payloads.small))
        document = parse(payloads.small)
        context = RequestContext(record)
        found, changed = Found(), False
        if isinstance(document, dict):
            changed = take_request_options(document, context)
            if dialect.complete is not None:
                changed |= dialect.complete(document)
            found = dialect.find(document, payloads, self._embeddings, most_media(self._limits))
            context.media = found.media
            check_counts(context.media, self._limits)
        self._check_size(len(payloads.small) + payloads.unclaimed_bytes)
        return ReadRequest(context, body, document, found, payloads, changed)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._max_json_bytes:
            raise RequestTooLarge(
                f"the request body has more than {self._max_json_bytes} bytes besides its images "
                "and files, which is the limit"
            )


def most_media(limits: MediaLimits | None) -> dict[str, int]:
    """How many media parts of each kind a request may have."""
    return {} if limits is None else {**limits.max_clips, "image": limits.max_images}


def check_counts(media: Sequence[MediaRef], limits: MediaLimits | None) -> None:
    """Hold the media of a request against the limits, before anything of them is loaded.

    Raises:
        ClientError: the model does not take media of this kind.
        TooManyImages: there are too many of one kind.
    """
    counts: dict[str, int] = {}
    for ref in media:
        kind = counted_as(ref)
        most = most_media(limits).get(kind, 0)
        if not most:
            raise ClientError(f"this model takes no {kind} input", param=ref.path)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > most:
            what = "images" if kind == "image" else f"{kind} parts"
            raise TooManyImages(
                f"the request has more than {most} {what}, which is the limit", param=ref.path
            )


def take_request_options(document: MutableMapping[str, Any], context: RequestContext) -> bool:
    """Move what asks about all images into `context`; returns whether there was any.

    Raises:
        ClientError: a value that the option does not take.
    """
    budget = document.pop("max_image_tokens", None)
    details = document.pop("include_image_details", None)
    if budget is not None and not is_positive(budget):
        raise ClientError("max_image_tokens must be a positive integer", param="max_image_tokens")
    if details is not None and not isinstance(details, bool):
        raise ClientError("include_image_details must be a boolean", param="include_image_details")
    context.max_image_tokens = budget
    context.include_image_details = bool(details)
    if details and document.get("stream") and "messages" in document:
        # The details come with the usage, so a stream must end with it.
        stream_options = document.get("stream_options") or {}
        if isinstance(stream_options, Mapping):
            document["stream_options"] = {**stream_options, "include_usage": True}
    return budget is not None or details is not None
