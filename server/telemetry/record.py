"""The record of one request: its id, its times, and what became of it."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from server.telemetry.stages import Segment, Stage, Timeline

Outcome = Literal["answered", "refused", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "failed", "cancelled")
_OVERLOAD = 503
_STAGES = tuple(Stage)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request as the engine got it: its tokens, images, and tokens of images."""

    tokens: int
    images: int
    image_tokens: int


@dataclass(eq=False)
class Record:
    """`epoch_ns` is the wall clock at `timeline.start`. `prompts` are by the engine's names for
    them, `under_way` the ids there that are not over. `complete`: all of the answer was sent, and
    no error in it. `left_in` is the stage in which the client left. `trace_id` is hexadecimal,
    `span` the request's span where it is traced."""

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
    left_in: Stage | None = None
    trace_id: str | None = None
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
        """How it ended; 503 is a refusal, since the server chose it."""
        if self.left_in is not None:
            return "cancelled"
        if not self.complete or self.status is None:
            return "failed"
        if self.status >= 500 and self.status != _OVERLOAD:
            return "failed"
        return "refused" if self.status >= 400 else "answered"

    def time_to_first_token(self) -> float | None:
        """Seconds from the request's first byte to the first piece of the answer."""
        at = self.timeline.first_token_at()
        return None if at is None else at - self.timeline.start

    def epoch(self, at: float) -> int:
        """A time of the timeline in nanoseconds since 1970."""
        return self.epoch_ns + round((at - self.timeline.start) * 1e9)


@dataclass(frozen=True)
class Times:
    """The stages of a record up to `end`: in stretches, and in seconds by stage."""

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
