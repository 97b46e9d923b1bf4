"""Jobs for image workers: out-of-range values are refused when a job is created."""

import math
from typing import Any

import pytest

from server.errors import ClientError, ImageFrameMissing
from server.workers.jobs import (
    CountFrames,
    DecodeIO,
    InspectPdf,
    Job,
    PixelsJob,
    ProcessJob,
    decode_kwargs,
    encode_job,
    encode_kwargs,
)
from server.workers.protocol import job_decoder


@pytest.mark.parametrize(
    "job",
    [
        PixelsJob("JPEG", (640, 480), 3, (64, 48), DecodeIO(None, (1, 2, 3))),
        ProcessJob("PDF", (640, 480), kwargs=encode_kwargs({"size": {"height": 3}})),
        InspectPdf(7),
        CountFrames(),
    ],
)
def test_a_job_is_equal_after_serialization(job: Job) -> None:
    assert job_decoder.decode(encode_job(job)) == job


def test_equal_kwargs_give_equal_bytes() -> None:
    one = {"size": {"height": 1, "width": 2}, "a": [1, 2.5, True, None, "é"]}
    other = {"a": (1, 2.5, True, None, "é"), "size": {"width": 2, "height": 1}}
    assert encode_kwargs(one) == encode_kwargs(other)
    assert decode_kwargs(encode_kwargs(other)) == one
    assert encode_kwargs({"a": 1}) != encode_kwargs({"a": 1.0})
    assert encode_kwargs({}) == b"{}"


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"x": math.nan}, "not finite"),
        ({"x": [{"y": -math.inf}]}, "not finite"),
        ({"x": 1 << 80}, "64 bits"),
        ({"x": 1 << 63}, "64 bits"),
        ({"x": "\ud800"}, "Unicode"),
        ({"\ud800": 1}, "Unicode"),
        ({"x": {1: 2}}, "strings as keys"),
        ({"x": object()}, "must be JSON values"),
        ({"x": b"bytes"}, "must be JSON values"),
        ({"x": nested(100)}, "levels deep"),
        ({"x": "y" * 40_000}, "the limit is 32768"),
    ],
)
def test_invalid_kwargs_are_refused(kwargs: dict[str, Any], problem: str) -> None:
    with pytest.raises(ClientError, match=problem) as caught:
        encode_kwargs(kwargs)
    assert caught.value.param == "mm_processor_kwargs"


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5, 1 << 31)])
def test_invalid_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ClientError, match="out of range"):
        ProcessJob("PNG", size)
    with pytest.raises(ClientError, match="out of range"):
        PixelsJob("PNG", (1, 1), resize=size)


@pytest.mark.parametrize("frame", [-1, 1 << 31, 10**30])
def test_invalid_frames_are_refused(frame: int) -> None:
    with pytest.raises(ImageFrameMissing):
        ProcessJob("PNG", (1, 1), frame)


def test_decode_options_are_accepted_in_vllms_forms() -> None:
    assert DecodeIO.of({}) == DecodeIO("RGB", (255, 255, 255))
    given = {"image_mode": None, "rgba_background_color": [0, 127, 255], "of_another_loader": 1}
    assert DecodeIO.of(given) == DecodeIO(None, (0, 127, 255))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mode", "RGBX-ray"),
        ("image_mode", 7),
        ("image_mode", ["RGB"]),
        ("rgba_background_color", [1, 2]),
        ("rgba_background_color", [1, 2, 256]),
        ("rgba_background_color", [1, 2, -1]),
        ("rgba_background_color", [1, 2, 0.5]),
        ("rgba_background_color", "white"),
    ],
)
def test_invalid_decode_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ClientError, match=name) as caught:
        DecodeIO.of({name: value})
    assert caught.value.param == f"media_io_kwargs.image.{name}"
