"""The Python client against the real server: answers, uploads, sizes, costs."""

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks import photos
from saccade_client import AsyncClient, Client, Conversation, boxes, errors, pdf, picture, video
from server.demo.samples import samples
from tests import pictures
from tests.conftest import Server
from tests.pictures import shape

RED, BLUE = (pictures.encode(shape(color)) for color in ("red", "blue"))
WHAT = "What is in the image?"
LARGE = (4000, 3000)


@pytest.fixture
def saccade(server: Server) -> Iterator[Client]:
    with Client(f"{server.url}/v1") as client:
        yield client


@pytest.fixture
def requests(saccade: Client) -> list[httpx.Request]:
    """All requests that the client sends."""
    seen: list[httpx.Request] = []
    saccade._http.event_hooks["request"].append(seen.append)
    return seen


def bodies(requests: list[httpx.Request], path: str) -> list[bytes]:
    return [request.read() for request in requests if request.url.path == path]


CHAT = "/v1/chat/completions"
COSTS = "/v1/images/tokens"


# ---------------------------------------------------------------------- the size of uploads


@pytest.mark.parametrize("options", [{}, {"detail": "low"}, {"max_tokens": 100}])
def test_a_large_photo_takes_a_fifth_of_the_bytes_and_the_same_tokens(
    server: Server, saccade: Client, requests: list[httpx.Request], options: dict[str, Any]
) -> None:
    photo = photos.photo(*LARGE, seed=1)
    assert len(photo) > 3_000_000
    small = saccade.ask(WHAT, picture(photo, **options), max_tokens=8)
    with Client(f"{server.url}/v1", resize=False) as client:
        seen: list[httpx.Request] = []
        client._http.event_hooks["request"].append(seen.append)
        large = client.ask(WHAT, picture(photo, **options), max_tokens=8)
    sent = sum(len(request.read()) for request in requests)  # questions about costs included
    assert 5 * sent <= len(bodies(seen, CHAT)[0])
    assert small.usage is not None
    assert large.usage is not None
    assert small.usage.image_tokens == large.usage.image_tokens
    assert small.usage.prompt_tokens == large.usage.prompt_tokens
    for answer in (small, large):
        (shown,) = answer.images
        assert (shown.width, shown.height) == LARGE
        assert shown.region == (0, 0, *LARGE)
    sizes = {(a.images[0].processed_width, a.images[0].processed_height) for a in (small, large)}
    assert len(sizes) == 1


def test_a_budget_gives_the_same_tokens(server: Server, saccade: Client) -> None:
    given = [photos.photo(1600, 1200, seed=2), photos.photo(1200, 1600, seed=3), RED]
    answers = [saccade.ask(WHAT, *given, max_tokens=4, max_image_tokens=150)]
    with Client(f"{server.url}/v1", resize=False) as client:
        answers.append(client.ask(WHAT, *given, max_tokens=4, max_image_tokens=150))
    small, large = ([shown.tokens for shown in answer.images] for answer in answers)
    assert small == large
    assert sum(tokens or 0 for tokens in small) <= 150


def test_costs_are_asked_once_for_each_size(saccade: Client, requests: list[httpx.Request]) -> None:
    for seed in (4, 5, 6):
        saccade.ask(WHAT, photos.photo(1600, 1200, seed=seed), max_tokens=1)
    assert len(bodies(requests, COSTS)) == 2
    assert len(bodies(requests, CHAT)) == 3


def test_costs_are_those_of_the_answer(saccade: Client) -> None:
    costs = saccade.costs(RED, picture(photos.photo(1600, 1200, seed=4), max_tokens=50))
    answer = saccade.ask(WHAT, RED, picture(photos.photo(1600, 1200, seed=4), max_tokens=50))
    assert [cost.tokens for cost in costs] == [shown.tokens for shown in answer.images]
    assert all(cost.kv_bytes > 0 for cost in costs)
    gif = pictures.encode(shape("red"), "GIF")  # the client does not tell its size
    assert [cost.tokens for cost in saccade.costs(gif)] == [costs[0].tokens]


# ---------------------------------------------------------------------- answers


def test_pictures_come_from_anything(saccade: Client, tmp_path: Any) -> None:
    image = shape("red")
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    numbers = np.asarray(image)
    for source in (path, str(path), RED, image, numbers, pictures.data_url(RED)):
        assert saccade.ask(WHAT, source, temperature=0).text == "a red circle"


def test_a_conversation_sends_a_picture_once(
    server: Server, saccade: Client, requests: list[httpx.Request]
) -> None:
    conversation = Conversation()
    unique = pictures.encode(shape("red", size=(231, 229)))
    assert saccade.ask(WHAT, unique, conversation=conversation).text == "a red circle"
    color = saccade.ask("What color is the shape?", conversation=conversation)
    assert color.text == "red"
    first, second = bodies(requests, CHAT)
    assert b"base64" in first
    assert b"base64" not in second
    assert color.images[0].cached == "embedding"
    with Client(f"{server.url}/v1", reuse=False) as client:
        assert client.ask(WHAT, unique).text == "a red circle"


def test_a_picture_that_the_server_forgot_is_sent_again(
    saccade: Client, requests: list[httpx.Request]
) -> None:
    never_sent = pictures.encode(shape("blue", size=(233, 227)))
    prepared = saccade._run(
        saccade._core.prepare([{"role": "user", "content": [picture(never_sent)]}])
    )
    saccade._core._known.update(dict.fromkeys(prepared.names(), True))
    assert saccade.ask(WHAT, never_sent).text == "a blue circle"
    assert [b"base64" in body for body in bodies(requests, CHAT)] == [False, True]


def test_an_upload_is_sent_once(saccade: Client, requests: list[httpx.Request]) -> None:
    first, again = saccade.upload(RED), saccade.upload(RED)
    assert first.file_id == again.file_id is not None
    assert len([r for r in requests if r.method == "POST" and r.url.path == "/v1/files"]) == 1
    assert saccade.ask(WHAT, first).text == "a red circle"
    saccade.delete(first.file_id)
    with pytest.raises(errors.NotFound):
        saccade.ask(WHAT, first)
    assert saccade.upload(RED).file_id != first.file_id


def test_a_stream_ends_with_the_whole_answer(saccade: Client) -> None:
    stream = saccade.stream(WHAT, photos.photo(1600, 1200, seed=4), temperature=0)
    text = "".join(stream)
    assert stream.answer.text == text
    (shown,) = stream.answer.images
    assert (shown.width, shown.height) == (1600, 1200)
    assert stream.answer.usage is not None
    assert stream.answer.usage.image_tokens == shown.tokens
    assert stream.answer.finish_reason == "stop"


def test_a_stream_may_be_left_early(saccade: Client) -> None:
    with saccade.stream(WHAT, RED, min_tokens=200, max_tokens=200) as stream:
        assert next(iter(stream))
    assert saccade.ask(WHAT, RED).text == "a red circle"


def test_boxes_are_in_pixels_of_the_original(saccade: Client) -> None:
    """The demo model's boxes, on a picture that is ten times as large."""
    found = 0
    for sample in samples():
        for question in sample.questions:
            if question.task != "box" or len(sample.files) > 1:
                continue
            (data,) = sample.files.values()
            small = Image.open(io.BytesIO(data))
            large = small.resize((small.width * 10, small.height * 10))
            file = pictures.encode(large.convert("RGB"), "JPEG")
            answer = saccade.ask(question.text, file, temperature=0, include_grounding=True)
            (box,) = answer.boxes()
            assert answer.grounding is not None
            assert answer.grounding[0].box == pytest.approx(box[:4], abs=0.2)
            (in_thousandths,) = boxes.find(answer.text)
            assert box.left == pytest.approx(in_thousandths.left * large.width / 1000)
            assert box.bottom == pytest.approx(in_thousandths.bottom * large.height / 1000)
            drawn = boxes.draw(file, [box])
            assert drawn.size == large.size
            found += 1
    assert found


def test_documents_and_videos_are_understood(saccade: Client) -> None:
    pages = io.BytesIO()
    shape("red").save(pages, "PDF", save_all=True, append_images=[shape("blue")])
    answer = saccade.ask(WHAT, pdf(pages.getvalue(), pages="2"), photos.photo(1600, 1200, seed=4))
    assert [shown.width for shown in answer.images][-1] == 1600
    assert len(answer.images) == 2
    clip = next(
        (name, data, sample.questions[0])
        for sample in samples()
        for name, data in sample.files.items()
        if name.endswith(".mp4")
    )
    assert saccade.ask(clip[2].text, video(clip[1])).text


def test_an_error_names_the_part(saccade: Client) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        saccade.ask(WHAT, RED, RED[:100])
    assert caught.value.code == "invalid_image"
    assert caught.value.param == "messages[0].content[1].image_url"
    assert caught.value.request_id
    with pytest.raises(errors.NotFound):
        saccade.ask(WHAT, RED, model="none")


def test_messages_for_other_clients_are_plain_json(
    saccade: Client, client: Any, http: httpx.Client
) -> None:
    photo = photos.photo(1600, 1200, seed=4)
    messages = saccade.messages([{"role": "user", "content": [picture(photo), WHAT]}])
    answer = client.chat.completions.create(model="saccade-tiny", messages=messages)
    ours = saccade.ask(WHAT, photo, temperature=0)
    assert answer.usage.prompt_tokens == ours.usage.prompt_tokens  # type: ignore[union-attr]


def test_the_async_client_answers_side_by_side(server: Server) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(f"{server.url}/v1") as client:
            asked = [client.ask(WHAT, data, temperature=0) for data in (RED, BLUE) * 4]
            texts = [answer.text for answer in await asyncio.gather(*asked)]
            stream = await client.stream(WHAT, RED, temperature=0)
            texts.append("".join([text async for text in stream]))
            assert stream.answer.text == texts[-1]
            assert [model.id for model in await client.models()] == ["saccade-tiny"]
            assert (await client.costs(RED))[0].tokens > 0
            assert "vllm" in await client.metrics()
            file = await client.upload(BLUE)
            assert file.file_id is not None
            await client.delete(file.file_id)
            return texts

    assert asyncio.run(ask()) == ["a red circle", "a blue circle"] * 4 + ["a red circle"]
