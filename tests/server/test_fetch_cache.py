"""The cache of fetched images, over HTTP."""

from collections.abc import Iterator

import httpx
import pytest

from tests import pictures
from tests.fetch_cache_bench import Bench
from tests.hostile_origin import HostileOrigin
from tests.scrape import FRESH


@pytest.fixture
def bench() -> Iterator[Bench]:
    with HostileOrigin() as origin:
        yield Bench(origin)


def test_a_fresh_picture_is_fetched_once(http: httpx.Client, bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=600", body=pictures.encode(pictures.shape("red")))
    part = {"type": "image_url", "image_url": {"url": bench.url}}
    request = {
        "model": "saccade-tiny",
        "messages": pictures.user(part, pictures.text_part("What is in the image?")),
        "max_tokens": 16,
        "temperature": 0,
    }
    for _ in range(2):
        response = http.post("/v1/chat/completions", json=request)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == "a red circle"
    assert len(picture.visits) == 1
    assert (
        'saccade_fetch_cache_requests_total{result="hit"}'
        in http.get("/metrics", headers=FRESH).text
    )
