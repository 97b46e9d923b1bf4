"""One request from the moment when its body has been read until its answer is complete.

A `RequestContext` is an argument of whatever works for the request. The one context variable is for
the moments when vLLM calls back in the middle of its own work, and is only read there.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from cachetools import LRUCache

from server.imaging.encoded import EncodedImage
from server.imaging.sampling import ChosenFrames
from server.imaging.tokens.video import VideoAllocation
from server.imaging.video.encoded import EncodedVideo
from server.request.admission import Permit
from server.request.budgets import Holdings
from server.request.grounding import GroundingOptions
from server.request.media import MediaRef
from server.telemetry.record import Record


class ShownImage(msgspec.Struct, frozen=True):
    """An image as the model sees it. Sizes are (width, height) in pixels.

    `size` is the upright original. `processed` is what the encoder gets, and covers `region` of the
    original: (left, top, right, bottom) in its pixels, which reaches beyond it where the processor
    pads. `tokens` are visual tokens. `cached`: the features were already cached.
    """

    size: tuple[int, int]
    tokens: int
    processed: tuple[int, int] | None
    region: tuple[float, float, float, float] | None
    frame: int = 0
    cached: bool = False


class ShownVideo(msgspec.Struct, frozen=True):
    """A video as the model sees it. Sizes are (width, height) in pixels.

    `size` is that of a frame of the original, `processed` what the encoder gets of each. `frames`
    are the numbers of its frames, from 0, and `times` their times in seconds. `tokens` are visual
    tokens. `cached`: the features were already cached.
    """

    size: tuple[int, int]
    frames: tuple[int, ...]
    times: tuple[float, ...]
    tokens: int
    processed: tuple[int, int] | None
    cached: bool = False

    @classmethod
    def of(
        cls, video: EncodedVideo, chosen: ChosenFrames, allocation: VideoAllocation
    ) -> "ShownVideo":
        """`video` with the `chosen` of its frames, as it is allocated."""
        return cls(
            video.size,
            chosen.indices,
            video.times(chosen.indices),
            allocation.tokens,
            allocation.processed,
        )


class Resolved(NamedTuple):
    """A media part, and which of its images a handle stands for; None of a clip."""

    ref: MediaRef
    image: EncodedImage | None


class RetainedMedia:
    """What handles stood for in earlier requests, where vLLM keeps these for later turns."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[str, Resolved] = LRUCache(max_bytes, getsizeof=_size_of)

    def put(self, handle: str, resolved: Resolved) -> None:
        """Keep it, unless it alone is more than the limit."""
        if _size_of(resolved) <= self._kept.maxsize:
            self._kept[handle] = resolved

    def get(self, handle: str) -> Resolved | None:
        return self._kept.get(handle)


def _size_of(resolved: Resolved) -> int:
    image = resolved.image
    return 1024 + len(resolved.ref.data if image is None else image.data)


@dataclass(eq=False)
class RequestContext:
    """What is known of one request.

    Attributes:
        record: its id, its group of API keys and its times, for the log, metrics and traces.
        media: its media parts, in the order of the body.
        max_image_tokens: the budget of visual tokens for all its images together.
        include_image_details: whether the answer is to tell of each image.
        grounding: how the boxes and points in the answer are read; None: they are not.
        constraint: the field of the body that constrains the output, if one does.
        is_constrained: whether a prompt was sent to the engine with a constraint on the output.
        shown: the images of its prompt, in order; filled when the prompt is rendered.
        shown_videos: the videos of its prompt, in order.
        encoded: for which of `shown` and then of `shown_videos` the vision encoder ran; None until
            the end of the answer, or where that is not known.
        retained: media of earlier requests, where vLLM keeps responses for later turns.
        permit: the right to work; None on routes that need none.
        writes_text: whether the route lets a stream of text write its events itself.
        on_queue: called with vLLM's queue for the outputs of a prompt, before there are any.
    """

    record: Record
    media: list[MediaRef] = field(default_factory=list)
    max_image_tokens: int | None = None
    include_image_details: bool = False
    grounding: GroundingOptions | None = None
    constraint: str = "structured_outputs"
    is_constrained: bool = False
    shown: list[ShownImage] = field(default_factory=list)
    shown_videos: list[ShownVideo] = field(default_factory=list)
    encoded: list[bool] | None = None
    retained: RetainedMedia | None = None
    permit: Permit | None = None
    writes_text: bool = False
    on_queue: Callable[[Any], None] | None = None
    _handles: dict[str, Resolved] = field(default_factory=dict)
    _texts: dict[int, list[str]] = field(default_factory=dict)

    @property
    def holdings(self) -> Holdings:
        """What the request holds of the budgets; those without a permit have no limits."""
        return self.permit.holdings if self.permit is not None else Holdings()

    @property
    def may_be_encoded(self) -> bool:
        """Whether an encoder may run for the request: for its media, or for those of earlier
        turns."""
        return bool(self.media) or self.retained is not None

    @property
    def group(self) -> str:
        """The group of API keys that the request belongs to; "" where keys are in no groups."""
        return self.record.key_group or ""

    def keep_text(self, choice: int, text: str) -> None:
        """Keep what an event of a stream adds to the text of a choice."""
        self._texts.setdefault(choice, []).append(text)

    @property
    def texts(self) -> dict[int, str]:
        """The text of each choice that was kept."""
        return {choice: "".join(pieces) for choice, pieces in self._texts.items()}

    def bind(self, handle: str, ref: MediaRef, image: EncodedImage | None = None) -> None:
        """Let `handle` stand for `ref`; `image`, if given, is the one of `ref.images` it means."""
        self._handles[handle] = Resolved(ref, image)
        if self.retained is not None:
            self.retained.put(handle, self._handles[handle])

    def resolve(self, handle: str) -> Resolved | None:
        """What `handle` stands for; None if it is not a handle of this request."""
        found = self._handles.get(handle)
        if found is None and self.retained is not None:
            return self.retained.get(handle)
        return found


_current: ContextVar[RequestContext] = ContextVar("saccade_request")


def current() -> RequestContext:
    """The request that vLLM is working for when it calls back.

    Raises:
        LookupError: outside of any request.
    """
    return _current.get()


def enter(context: RequestContext) -> None:
    """Make `context` the one that the current task works for."""
    _current.set(context)


@contextlib.contextmanager
def entered(context: RequestContext) -> Iterator[RequestContext]:
    """Make `context` the current one of the task meanwhile."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
