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
from server.request.bounds import BodyBounds, check_items, check_text
from server.request.context import RequestContext
from server.request.dialects import Dialect, Found
from server.request.dialects.base import counted_as
from server.request.grounding import BY_DEFAULT, GroundingOptions, grounding_of
from server.request.media import MediaLimits, MediaRef, Pictures
from server.request.numbers import check_integers
from server.request.options import is_positive
from server.request.payloads import MIN_PAYLOAD_BYTES, Payloads, parse
from server.telemetry.record import Record

_HANDLE_BYTES = 16
# Fields that constrain the output, of all dialects.
_CONSTRAINTS = ("structured_outputs", "response_format", "text", "output_config", "tools")
_MAX_MODEL_CHARS = 1024
# Fields that may be lists of prompts, of all dialects.
_PROMPTS = ("prompt", "input", "messages", "text_1", "text_2", "documents", "items")
# Reading or writing this much takes about 0.1 ms, the same as handing it to a thread.
SMALL_BODY_BYTES = 8 * MIN_PAYLOAD_BYTES


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
        self.place_handles()
        return self.written()

    def place_handles(self) -> None:
        """The first step of `rewritten`, which must be done on the event loop."""
        self.found.fill(self._handles)

    def whole(self) -> dict[str, Any] | None:
        """The document, for a route that takes one, in the place of the second step. None if it is
        not an object, or if payloads were taken out of it that belong to no part."""
        if isinstance(self.document, dict) and not self.payloads.unclaimed_bytes:
            return self.document
        return None

    def written(self) -> bytes:
        """The second step of `rewritten`, whose time grows with the body."""
        if not (self.changed or self.found.changed or self.found.slots):
            return self.body
        try:
            document = msgspec.json.encode(self.document)
        except OverflowError:  # an integer of more than 64 bits
            raise ClientError("the request body has an integer out of range") from None
        except RecursionError:  # it was read with a less deep stack
            raise ClientError("the request body is nested too deeply") from None
        return self.payloads.restored(document)

    @property
    def is_small(self) -> bool:
        """Whether `written` is cheap enough for the event loop."""
        return self.kept_bytes < SMALL_BODY_BYTES

    @property
    def kept_bytes(self) -> int:
        """What is left of the body once its media are loaded, in bytes."""
        return len(self.payloads.small) + self.payloads.unclaimed_bytes

    @property
    def engine_requests(self) -> int:
        """How many requests the engine will get, as far as the document shows it: answers times
        prompts."""
        document = self.document if isinstance(self.document, dict) else {}
        n = document.get("n")
        answers = n if type(n) is int and n > 0 else 1
        return answers * max(_prompts(document.get(name)) for name in _PROMPTS)

    def release(self) -> None:
        """Free the body, which nothing needs once the route has its own."""
        self.body, self.payloads = b"", Payloads(b"")

    def _handles(self, ref: MediaRef) -> list[str]:
        handles = [f"media-{secrets.token_hex(_HANDLE_BYTES)}" for _ in ref.images or (None,)]
        for handle, image in zip(handles, ref.images or (None,), strict=True):
            self.context.bind(handle, ref, image)
        return handles


class RequestReader:
    """Reads bodies under the limits of the server and of the model."""

    def __init__(
        self,
        limits: MediaLimits | None,
        embeddings: frozenset[str],
        bounds: BodyBounds,
        grounding: GroundingOptions = BY_DEFAULT,
    ) -> None:
        """`limits` is None where the model takes no media at all. `embeddings` are the types of
        parts with embeddings that the server takes. `grounding` has the model's defaults."""
        self._limits = limits
        self._embeddings = embeddings
        self._bounds = bounds
        self._grounding = grounding

    def read(self, body: bytes, dialect: Dialect, record: Record) -> ReadRequest:
        """Read a JSON body. Its time grows with the body.

        Raises:
            RequestTooLarge: too much is left when the payloads are taken out.
            RequestTooComplex: it has too many values, levels or items.
            ClientError: it is not JSON, or a part or an option is wrong; `param` names it.
            TooManyImages: more media than the limits allow.
        """
        payloads = Payloads(body)
        self._check_size(len(payloads.small))
        check_text(payloads.small, self._bounds)
        document = parse(payloads.small)
        check_integers(document, payloads.small)
        context = RequestContext(record)
        found, changed = Found(), False
        if isinstance(document, dict):
            check_model_name(document.get("model"))
            check_items(document, self._bounds.items)
            changed = take_request_options(document, context, self._grounding)
            context.constraint = constraint_of(document)
            if dialect.complete is not None:
                changed |= dialect.complete(document)
            found = dialect.find(document, payloads, self._embeddings, most_media(self._limits))
            context.media = found.media
            check_counts(context.media, self._limits)
        self._check_size(len(payloads.small) + payloads.unclaimed_bytes)
        return ReadRequest(context, body, document, found, payloads, changed)

    def _check_size(self, nbytes: int) -> None:
        most = self._bounds.json_bytes
        if nbytes > most:
            raise RequestTooLarge(
                f"the request body has more than {most} bytes besides its images "
                "and files, which is the limit"
            )


def _prompts(value: object) -> int:
    """The number of prompts in a field: texts, or lists of tokens or of messages."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        return 1
    return len(value)


def check_model_name(name: object) -> None:
    """Raises ClientError if `name` is too long: it occurs in answers and in log lines."""
    if isinstance(name, str) and len(name) > _MAX_MODEL_CHARS:
        raise ClientError(
            f"the model's name has more than {_MAX_MODEL_CHARS} characters", param="model"
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
        check_frames(ref, limits)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > most:
            what = "images" if kind == "image" else f"{kind} parts"
            raise TooManyImages(
                f"the request has more than {most} {what}, which is the limit", param=ref.path
            )


def check_frames(ref: MediaRef, limits: MediaLimits | None) -> None:
    """Raises ClientError if a video asks for more frames, or is sent as more pictures, than one may
    show."""
    most = limits.max_shown_frames if limits is not None else 0
    sampling, source = ref.sampling, ref.source
    if max(sampling.num_frames or 0, sampling.max_frames or 0) > most:
        raise ClientError(f"the model gets at most {most} frames of a video", param=ref.path)
    if isinstance(source, Pictures) and len(source.frames) > most:
        raise TooManyImages(
            f"the video has more than {most} pictures, which is the limit", param=ref.path
        )


def take_request_options(
    document: MutableMapping[str, Any], context: RequestContext, grounding: GroundingOptions
) -> bool:
    """Move what asks about all images into `context`; returns whether there was any.

    Raises:
        ClientError: a value that the option does not take.
    """
    budget = document.pop("max_image_tokens", None)
    details = document.pop("include_image_details", None)
    places = document.pop("include_grounding", None)
    if budget is not None and not is_positive(budget):
        raise ClientError("max_image_tokens must be a positive integer", param="max_image_tokens")
    if details is not None and not isinstance(details, bool):
        raise ClientError("include_image_details must be a boolean", param="include_image_details")
    context.max_image_tokens = budget
    context.include_image_details = bool(details)
    context.grounding = grounding_of(places, grounding)
    if (details or places) and document.get("stream") and "messages" in document:
        # Both come with the usage, so a stream must end with it.
        stream_options = document.get("stream_options") or {}
        if isinstance(stream_options, Mapping):
            document["stream_options"] = {**stream_options, "include_usage": True}
    return any(option is not None for option in (budget, details, places))


def constraint_of(document: Mapping[str, Any]) -> str:
    """The field that constrains the output: the first of those that can and is there."""
    given = (name for name in _CONSTRAINTS if document.get(name))
    return next(given, _CONSTRAINTS[0])
