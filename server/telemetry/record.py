"""The record of one request: its id, its times and its outcome."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from server.errors import ClientError
from server.telemetry.stages import Segment, Stage, Timeline

Outcome = Literal["answered", "refused", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "failed", "cancelled")
_OVERLOAD = 503
_STAGES = tuple(Stage)


class Prompt(msgspec.Struct, frozen=True):
    """One prompt as sent to the engine: its tokens, its images, and the tokens of its images and
    videos."""

    tokens: int
    images: int
    image_tokens: int


@dataclass(eq=False)
class Record:
    """What the server knows about one request, for metrics, logs and traces.

    Attributes:
        epoch_ns: the wall clock at `timeline.start`, in nanoseconds since 1970.
        prompts: the prompts of the request, by the engine's request id.
        under_way: the engine's ids of its prompts that are not finished.
        status: the HTTP status of the answer; None before it begins.
        complete: whether the whole answer was sent, without an error in it.
        refusal: why the engine refused the request, if it did.
        left_in: the stage in which the client left; None if it did not.
        trace_id: in hexadecimal.
        deadline: when its work ends at the latest, on `time.monotonic()`; None: never.
        headers: further headers of its answer.
        background: whether it is a request of a batch, whose latency is of no interest.
        span: the OpenTelemetry span of the request; None if it is not traced.
    """

    id: str = ""
    method: str = ""
    path: str = ""
    route: str | None = None
    client: str | None = None
    timeline: Timeline = field(default_factory=lambda: Timeline(time.monotonic()))
    epoch_ns: int = field(default_factory=time.time_ns)
    key_group: str | None = None
    model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    prompts: dict[str, Prompt] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)
    completion_tokens: int = 0
    status: int | None = None
    complete: bool = False
    error_code: str | None = None
    refusal: ClientError | None = None
    left_in: Stage | None = None
    trace_id: str | None = None
    deadline: float | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    background: bool = False
    span: Any = None

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts.values())

    @property
    def images(self) -> int:
        return sum(prompt.images for prompt in self.prompts.values())

    @property
    def image_tokens(self) -> int:
        return sum(prompt.image_tokens for prompt in self.prompts.values())

    @property
    def outcome(self) -> Outcome:
        """How the request ended. A 503 counts as refused, since the server chose to refuse it."""
        if self.left_in is not None:
            return "cancelled"
        if not self.complete or self.status is None:
            return "failed"
        if self.status >= 500 and self.status != _OVERLOAD:
            return "failed"
        return "refused" if self.status >= 400 else "answered"

    def time_to_first_token(self) -> float | None:
        """Seconds from the first byte of the request to the first chunk of the answer; None before
        that."""
        at = self.timeline.first_token_at()
        return None if at is None else at - self.timeline.start

    def epoch(self, at: float) -> int:
        """Convert a time on the timeline to nanoseconds since 1970."""
        return self.epoch_ns + round((at - self.timeline.start) * 1e9)


@dataclass(frozen=True)
class Times:
    """The stages of a request up to `end`: as segments, and in seconds by stage."""

    end: float
    segments: list[Segment]
    stages: dict[Stage, float]

    @classmethod
    def of(cls, timeline: Timeline, end: float) -> "Times":
        segments = timeline.segments(end)
        sums: dict[Stage, float] = {}
        for segment in segments:
            sums[segment.stage] = sums.get(segment.stage, 0.0) + segment.seconds
        return cls(end, segments, {stage: sums[stage] for stage in _STAGES if stage in sums})
