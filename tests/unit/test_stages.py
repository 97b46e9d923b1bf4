"""The timeline of a request: each moment belongs to one stage, even if stages overlap."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.record import Times
from server.telemetry.stages import ImageWork, Stage, Timeline


def _phases(timeline: Timeline) -> None:
    for phase, at in (
        (Stage.ADMISSION, 1),
        (Stage.RENDER, 2),
        (Stage.ENGINE_QUEUE, 10),
        (Stage.PREFILL, 11),
        (Stage.FIRST_TOKEN, 20),
        (Stage.GENERATE, 21),
        (Stage.RESPOND, 30),
    ):
        timeline.begin(phase, at)


def _work(
    queued: float, given: float | None, done: float | None, preprocess_s: float = 0.0
) -> ImageWork:
    return ImageWork(queued, given, done, preprocess_s)


def test_a_request_without_images_has_only_its_phases() -> None:
    timeline = Timeline(0)
    _phases(timeline)
    assert Times.of(timeline, 31).stages == {
        Stage.UPLOAD: 1,
        Stage.ADMISSION: 1,
        Stage.RENDER: 8,
        Stage.ENGINE_QUEUE: 1,
        Stage.PREFILL: 9,
        Stage.FIRST_TOKEN: 1,
        Stage.GENERATE: 9,
        Stage.RESPOND: 1,
    }


def test_image_work_takes_precedence_over_the_phase_around_it() -> None:
    timeline = Timeline(0)
    _phases(timeline)
    timeline.fetch(2.5).end = 4
    timeline.join(_work(4, 5, 8, preprocess_s=1), 4)
    timeline.encode(12, 15)
    found = [(s.stage, s.start, s.end) for s in timeline.segments(31)]
    assert found[2:] == [
        (Stage.RENDER, 2, 2.5),
        (Stage.FETCH, 2.5, 4),
        (Stage.IMAGE_QUEUE, 4, 5),
        (Stage.DECODE, 5, 7),
        (Stage.PREPROCESS, 7, 8),
        (Stage.RENDER, 8, 10),
        (Stage.ENGINE_QUEUE, 10, 11),
        (Stage.PREFILL, 11, 12),
        (Stage.ENCODE, 12, 15),
        (Stage.PREFILL, 15, 20),
        (Stage.FIRST_TOKEN, 20, 21),
        (Stage.GENERATE, 21, 30),
        (Stage.RESPOND, 30, 31),
    ]


def test_the_image_furthest_behind_determines_the_stage() -> None:
    timeline = Timeline(0)
    timeline.begin(Stage.RENDER, 0)
    timeline.fetch(0).end = 6
    timeline.join(_work(1, 2, 5, preprocess_s=1), 1)
    timeline.join(_work(5, 8, 9), 5)
    found = [(s.stage, s.start, s.end) for s in timeline.segments(10)]
    assert found == [
        (Stage.FETCH, 0, 6),
        (Stage.IMAGE_QUEUE, 6, 8),
        (Stage.DECODE, 8, 9),
        (Stage.RENDER, 9, 10),
    ]


def test_shared_work_counts_from_the_time_it_was_joined() -> None:
    timeline = Timeline(10)
    timeline.begin(Stage.RENDER, 10)
    timeline.join(_work(1, 2, 14, preprocess_s=3), 12)
    assert Times.of(timeline, 15).stages == {Stage.PREPROCESS: 2, Stage.RENDER: 3}


def test_the_current_stage_is_the_one_in_progress() -> None:
    timeline = Timeline(0)
    assert timeline.stage() is Stage.UPLOAD
    timeline.begin(Stage.RENDER, 1)
    fetch = timeline.fetch(1)
    assert timeline.stage() is Stage.FETCH
    fetch.end = 2
    work = ImageWork(2)
    timeline.join(work, 2)
    assert timeline.stage() is Stage.IMAGE_QUEUE
    work.given = 3
    assert timeline.stage() is Stage.DECODE
    work.done = 4
    assert timeline.stage() is Stage.RENDER
    timeline.begin(Stage.ENGINE_QUEUE, 5)
    assert timeline.stage() is Stage.ENGINE_QUEUE


def test_unfinished_stages_end_with_the_request() -> None:
    timeline = Timeline(0)
    timeline.begin(Stage.RENDER, 1)
    timeline.fetch(2)
    timeline.join(ImageWork(3), 3)
    assert Times.of(timeline, 5).stages == {Stage.UPLOAD: 1, Stage.FETCH: 3, Stage.RENDER: 1}


times = st.floats(min_value=0, max_value=100, allow_nan=False)
spans = st.tuples(times, times).map(sorted)


@given(
    phases=st.dictionaries(st.sampled_from(list(Stage)), times),
    fetches=st.lists(spans, max_size=5),
    works=st.lists(st.tuples(times, spans, st.one_of(st.none(), times), times), max_size=5),
    encodes=st.lists(spans, max_size=3),
    end=times,
)
def test_stages_always_add_up_to_the_duration_of_the_request(
    phases, fetches, works, encodes, end
) -> None:
    timeline = Timeline(0)
    for phase, at in phases.items():
        timeline.begin(phase, at)
    for start, stop in fetches:
        timeline.fetch(start).end = stop
    for joined, (queued, begun), done, preprocess_s in works:
        timeline.join(_work(queued, begun, done, preprocess_s), joined)
    for start, stop in encodes:
        timeline.encode(start, stop)
    segments = timeline.segments(end)
    assert sum(segment.seconds for segment in segments) == pytest.approx(end)
    assert all(segment.seconds > 0 for segment in segments)
    at = 0.0
    for segment in segments:
        assert segment.start == at
        at = segment.end
    assert all(a.stage != b.stage for a, b in pairwise(segments))
