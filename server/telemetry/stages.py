"""Where the time of one request goes. Each moment belongs to exactly one stage.

    upload, admission, render, engine_queue, prefill, first_token, generate, respond

are phases: each begins where the previous one ends. While an image is fetched, waits for a worker,
is decoded or preprocessed, or while the encoder runs, the moment belongs to that stage instead;
with several images, to the stage of the image that is furthest behind. So the stages of a request
add up to its duration, and those up to `first_token` to its time to first token.

All times are seconds on `time.monotonic()`, which the processes of one machine share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from operator import itemgetter
from typing import NamedTuple


class Stage(StrEnum):
    """In the order in which a request goes through them."""

    UPLOAD = "upload"
    """The body arrives."""
    ADMISSION = "admission"
    """The body is parsed, the request waits for its permit, and its files are inspected."""
    FETCH = "fetch"
    """Images are loaded from the web, the disk or the body."""
    IMAGE_QUEUE = "image_queue"
    """Images wait for a worker."""
    DECODE = "decode"
    """A worker decodes an image; includes the transfer of the image to the worker."""
    PREPROCESS = "preprocess"
    """A worker runs the model's processor."""
    RENDER = "render"
    """Chat template, tokens, placeholders; on routes without the engine, all work of the route."""
    ENGINE_QUEUE = "engine_queue"
    """The request was sent to the engine and is not scheduled yet."""
    ENCODE = "encode"
    """The vision encoder runs."""
    PREFILL = "prefill"
    """The language model processes the prompt; includes the steps of other requests in between."""
    FIRST_TOKEN = "first_token"  # noqa: S105 - a token of text
    """From the first token in the engine to the first chunk of the answer."""
    GENERATE = "generate"
    """From the first chunk to the last token."""
    RESPOND = "respond"
    """The rest of the answer is written and sent."""


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
# Stages that take precedence over the phase, and over those after them in this order.
_OVERLAYS = (
    Stage.FETCH,
    Stage.IMAGE_QUEUE,
    Stage.DECODE,
    Stage.PREPROCESS,
    Stage.ENCODE,
)


class Segment(NamedTuple):
    """A span of time in one stage."""

    stage: Stage
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(eq=False)
class ImageWork:
    """One image's passage through the pool, shared by all requests that wait for it.

    Attributes:
        queued: when the image entered the queue.
        given: when a worker got it.
        done: when the worker replied, or the pool gave up.
        preprocess_s: how long the model's processor took at the end, in seconds.
        decoded: when the worker said that the image is decoded, which it says if that took long.
    """

    queued: float
    given: float | None = None
    done: float | None = None
    preprocess_s: float = 0.0
    decoded: float | None = None

    def segments(self, since: float, until: float) -> Iterator[Segment]:
        """Yield its stages between `since` and `until`."""
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
        """The current stage of the image; None once it is done."""
        if self.done is not None:
            return None
        if self.given is None:
            return Stage.IMAGE_QUEUE
        return Stage.DECODE if self.decoded is None else Stage.PREPROCESS


@dataclass(eq=False)
class Fetch:
    """The load of one image or file. `end` is None until it ends."""

    start: float
    end: float | None = None


@dataclass(eq=False)
class Timeline:
    """The events of one request, from `start` on."""

    start: float
    _phases: dict[Stage, float] = field(default_factory=dict)
    _fetches: list[Fetch] = field(default_factory=list)
    _works: list[tuple[float, ImageWork]] = field(default_factory=list)
    _encodes: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, phase: Stage, at: float) -> None:
        """Note that `phase` began at this time. Only the first call for a phase counts."""
        self._phases.setdefault(phase, at)

    def begin_again(self, phase: Stage, at: float) -> None:
        """Note that `phase` began at this time, in place of an earlier one."""
        self._phases[phase] = at

    def began(self, phase: Stage) -> bool:
        return phase in self._phases

    def fetch(self, at: float) -> Fetch:
        """Note that the load of an image began; the caller sets its end."""
        fetch = Fetch(at)
        self._fetches.append(fetch)
        return fetch

    def join(self, work: ImageWork, at: float) -> None:
        """Note that the request waits for `work` from this time on."""
        self._works.append((at, work))

    def encode(self, start: float, end: float) -> None:
        """Note that the encoder ran for the request."""
        self._encodes.append((start, end))

    def stage(self) -> Stage:
        """The current stage, as far as the server knows it: the engine reports only encoder runs
        and the first token."""
        if any(fetch.end is None for fetch in self._fetches):
            return Stage.FETCH
        found = {work.stage for _, work in self._works}
        for stage in (Stage.IMAGE_QUEUE, Stage.DECODE, Stage.PREPROCESS):
            if stage in found:
                return stage
        return next((p for p in reversed(_PHASES) if p in self._phases), Stage.UPLOAD)

    def segments(self, end: float) -> list[Segment]:
        """The time from `start` to `end`, split where the stage changes; O(n log n) in events.

        Clocks read in several processes may order the starts of two phases wrongly. The later phase
        then counts from the start of the earlier one.
        """
        events: list[tuple[float, int, Stage]] = []
        at = self.start
        for phase in _PHASES:
            if phase in self._phases:
                at = min(max(at, self._phases[phase]), end)
                events.append((at, 0, phase))
        for stage, start, until in self.image_segments(end):
            events += ((start, 1, stage), (until, -1, stage))
        events.sort(key=itemgetter(0))
        events.append((end, 0, Stage.RESPOND))
        active = dict.fromkeys(_OVERLAYS, 0)
        overlays = 0  # how many are active
        found: list[Segment] = []
        at, phase = self.start, Stage.UPLOAD
        for moment, change, stage in events:
            if moment > at:
                now = next(each for each in _OVERLAYS if active[each]) if overlays else phase
                if found and found[-1].stage is now:
                    found[-1] = Segment(now, found[-1].start, moment)
                else:
                    found.append(Segment(now, at, moment))
                at = moment
            if change:
                active[stage] += change
                overlays += change
            else:
                phase = stage
        return found

    def image_segments(self, end: float) -> Iterator[Segment]:
        """Yield the stages of each image, as segments that may overlap."""
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
        """When the first chunk of the answer was ready; None before that."""
        return self._phases.get(Stage.GENERATE)
