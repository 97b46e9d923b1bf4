"""Where the time of one request goes. Each moment counts to exactly one stage.

    upload, admission, render, engine_queue, prefill, first_token, generate, respond

are phases: one begins where the one before it ends. While some image is fetched, waits for a
worker, is decoded or preprocessed, or the encoder runs, the moment counts to that instead; with
several images, to what the one that is furthest behind is doing. So the stages of a request add up
to its duration, and those up to `first_token` to its time to first token.

All times are seconds on `time.monotonic()`, which the processes of one machine share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple


class Stage(StrEnum):
    """In the order in which a request goes through them."""

    UPLOAD = "upload"
    """The body arrives."""
    ADMISSION = "admission"
    """The body is parsed and its options are read, and its files looked into."""
    FETCH = "fetch"
    """Images are loaded from where they are: the web, the disk, the body."""
    IMAGE_QUEUE = "image_queue"
    """Images wait for a worker."""
    DECODE = "decode"
    """A worker decodes; with the way of the picture to it."""
    PREPROCESS = "preprocess"
    """A worker runs the model's processor."""
    RENDER = "render"
    """Chat template, tokens, placeholders; on routes without the engine, the route's own work."""
    ENGINE_QUEUE = "engine_queue"
    """Sent to the engine and not scheduled yet."""
    ENCODE = "encode"
    """The vision encoder runs."""
    PREFILL = "prefill"
    """The language model reads the prompt; with the steps of others in between."""
    FIRST_TOKEN = "first_token"  # noqa: S105
    """From the first token in the engine to the first piece of the answer."""
    GENERATE = "generate"
    """From the first piece to the last token."""
    RESPOND = "respond"
    """What is left of the answer is written and sent."""


_PHASES = (
    Stage.UPLOAD,
    Stage.ADMISSION,
    Stage.RENDER,
    Stage.ENGINE_QUEUE,
    Stage.PREFILL,
    Stage.FIRST_TOKEN,
    Stage.GENERATE,
    Stage.RESPOND,
)
# What goes before the phase, and before those behind it in this order.
_OVERLAYS = (
    Stage.FETCH,
    Stage.IMAGE_QUEUE,
    Stage.DECODE,
    Stage.PREPROCESS,
    Stage.ENCODE,
)


class Segment(NamedTuple):
    """A stretch of time."""

    stage: Stage
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(eq=False)
class ImageWork:
    """One image's way through the pool; shared by all requests that wait for it.

    `given` to a worker, `done` when it replied or gave up, after `preprocess_s` seconds of the
    model's processor.
    """

    queued: float
    given: float | None = None
    done: float | None = None
    preprocess_s: float = 0.0

    def segments(self, since: float, until: float) -> Iterator[Segment]:
        """Its stages between two times."""
        done = until if self.done is None else min(self.done, until)
        given = done if self.given is None else min(self.given, done)
        decoded = max(given, done - self.preprocess_s)
        ends = ((self.queued, given, Stage.IMAGE_QUEUE), (given, decoded, Stage.DECODE),
                (decoded, done, Stage.PREPROCESS))  # fmt: skip
        for start, end, stage in ends:
            if max(start, since) < end:
                yield Segment(stage, max(start, since), end)

    @property
    def stage(self) -> Stage | None:
        """What is done with it now; None if that is over."""
        if self.done is not None:
            return None
        return Stage.IMAGE_QUEUE if self.given is None else Stage.DECODE


@dataclass(eq=False)
class Fetch:
    """One image on its way from where it is."""

    start: float
    end: float | None = None


@dataclass(eq=False)
class Timeline:
    """What was noted of one request, from `start` on."""

    start: float
    _phases: dict[Stage, float] = field(default_factory=dict)
    _fetches: list[Fetch] = field(default_factory=list)
    _works: list[tuple[float, ImageWork]] = field(default_factory=list)
    _encodes: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, phase: Stage, at: float) -> None:
        """`phase` began at this time; what is said of it later does not count."""
        self._phases.setdefault(phase, at)

    def begin_again(self, phase: Stage, at: float) -> None:
        """`phase` began at this time, whatever was said before."""
        self._phases[phase] = at

    def began(self, phase: Stage) -> bool:
        return phase in self._phases

    def fetch(self, at: float) -> Fetch:
        """An image begins to be loaded; the caller sets the end."""
        fetch = Fetch(at)
        self._fetches.append(fetch)
        return fetch

    def join(self, work: ImageWork, at: float) -> None:
        """The request waits for `work` from now on."""
        self._works.append((at, work))

    def encode(self, start: float, end: float) -> None:
        """The encoder ran for the request."""
        self._encodes.append((start, end))

    def stage(self) -> Stage:
        """The stage that the request is in now, as far as it is known: the engine tells what it
        does with its reports of the encoder and with the first token."""
        if any(fetch.end is None for fetch in self._fetches):
            return Stage.FETCH
        found = {work.stage for _, work in self._works}
        for stage in (Stage.IMAGE_QUEUE, Stage.DECODE):
            if stage in found:
                return stage
        return next((p for p in reversed(_PHASES) if p in self._phases), Stage.UPLOAD)

    def segments(self, end: float) -> list[Segment]:
        """The time from start to `end`, cut where the stage changes. O(n log n) in what was noted.

        What was noted out of order, by clocks read in several processes, counts from where the
        phase before it began.
        """
        bounds, at = [(self.start, Stage.UPLOAD)], self.start
        for phase in _PHASES:
            if phase in self._phases:
                at = min(max(at, self._phases[phase]), end)
                bounds.append((at, phase))
        bounds.append((end, Stage.RESPOND))
        changes = [
            (moment, change, segment.stage)
            for segment in self.image_segments(end)
            for moment, change in ((segment.start, 1), (segment.end, -1))
        ]
        changes.sort(key=lambda change: change[0])
        active = dict.fromkeys(_OVERLAYS, 0)
        found: list[Segment] = []
        index = 0
        for (begun, phase), (over, _) in pairwise(bounds):
            at = begun
            while True:
                while index < len(changes) and changes[index][0] <= at:
                    active[changes[index][2]] += changes[index][1]
                    index += 1
                until = min(over, changes[index][0]) if index < len(changes) else over
                if until > at:
                    stage = next((each for each in _OVERLAYS if active[each]), phase)
                    _append(found, Segment(stage, at, until))
                    at = until
                if at >= over:
                    break
        return found

    def image_segments(self, end: float) -> Iterator[Segment]:
        """What was done for each image, in stretches that may lie over each other."""
        for fetch in self._fetches:
            until = end if fetch.end is None else min(fetch.end, end)
            if fetch.start < until:
                yield Segment(Stage.FETCH, fetch.start, until)
        for joined, work in self._works:
            yield from work.segments(joined, end)
        for start, until in self._encodes:
            if max(start, self.start) < min(until, end):
                yield Segment(Stage.ENCODE, max(start, self.start), min(until, end))

    def first_token_at(self) -> float | None:
        """When the first piece of the answer was there."""
        return self._phases.get(Stage.GENERATE)


def _append(found: list[Segment], segment: Segment) -> None:
    if found and found[-1].stage is segment.stage:
        segment = Segment(segment.stage, found.pop().start, segment.end)
    found.append(segment)
