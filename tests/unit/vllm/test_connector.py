"""Videos that vLLM preprocesses, which knows neither caps nor options."""

import pytest

from server.engine.connector import HandleConnector
from server.errors import ClientError
from server.imaging.sampling import SamplingOptions
from server.request.context import RequestContext, entered
from server.request.media import MediaRef
from server.telemetry.record import Record

PATH = "messages[0].content[0].video_url"


def refusal(ref: MediaRef, budget: int | None = None, cap: int | None = None) -> ClientError | None:
    connector = HandleConnector()
    context = RequestContext(Record(), max_image_tokens=budget)
    with pytest.MonkeyPatch.context() as patch, entered(context):
        patch.setattr(HandleConnector, "max_video_tokens", cap)
        try:
            connector._check_uncapped(ref)
        except ClientError as error:
            return error
    return None


def test_caps_that_cannot_be_held_are_refused() -> None:
    video = MediaRef("video", PATH, None)
    assert refusal(video) is None
    with_options = MediaRef("video", PATH, None, sampling=SamplingOptions(max_tokens=50))
    for refused, param in (
        (refusal(with_options), PATH),
        (refusal(video, budget=50), "max_image_tokens"),
        (refusal(video, cap=50), PATH),
    ):
        assert refused is not None
        assert refused.param == param
        assert "this model does not support" in refused.message
