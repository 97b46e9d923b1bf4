"""Requests are read for their options, and files and animations become images."""

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.errors import ClientError, ImageFrameMissing, InvalidFile, TooManyImages
from server.imaging.encoded import EncodedImage, ImageOptions
from server.imaging.limits import Limits
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.load import ImageLoader
from server.request import context as request
from server.request import payloads
from server.request.image_request import ImageRequest
from server.request.prepare import Bounds, RequestPreparer
from server.telemetry.stages import Timeline
from server.workers.jobs import CountFrames, InspectPdf
from server.workers.worker import inspect
from tests import pictures

LIMITS = Limits(50 << 20, 100_000_000, 32_768, 200)
BOUNDS = Bounds(max_images=8, max_frames=5, max_pages=4, pdf_dpi=144, limits=LIMITS)


class Inspector:
    """What an image worker does, in this process."""

    async def inspect_pdf(
        self, data: bytes, max_pages: int, timeline: Timeline
    ) -> tuple[Sequence[tuple[float, float]], int]:
        found: Any = inspect(data, InspectPdf(max_pages))
        return [tuple(size) for size in found["sizes"].data.tolist()], found["count"]

    async def count_frames(self, data: bytes, timeline: Timeline) -> int:
        found: Any = inspect(data, CountFrames())
        count: int = found["count"]
        return count


def prepare(document: Any, *, stored: bool = False) -> ImageRequest:
    loader = ImageLoader(Fetcher(FetchSettings()), LIMITS, None)
    preparer = RequestPreparer(loader, Inspector(), BOUNDS)
    taken = payloads.take_out(json.dumps(document).encode())

    async def run() -> ImageRequest:
        read = preparer.read(taken)
        request.enter(read.request)
        return await preparer.complete(read, stored=stored)

    return asyncio.run(run())


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": pictures.user(*parts), **more}


def pdf(*sizes: tuple[int, int], color: str = "white") -> bytes:
    """A PDF with a page of so many points for each size."""
    pages = [Image.new("RGB", size, color) for size in sizes]
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:], resolution=72)
    return file.getvalue()


def gif(frames: int) -> bytes:
    images = [Image.new("RGB", (40, 30), (index * 10, 0, 0)) for index in range(frames)]
    return pictures.encode(images[0], "GIF", save_all=True, append_images=images[1:])


def file_part(data: bytes, **more: Any) -> dict[str, Any]:
    url = pictures.data_url(data, "application/pdf")
    return {"type": "file", "file": {"file_data": url, "filename": "a.pdf", **more}}


def shown(prepared: ImageRequest) -> list[EncodedImage]:
    """The images that the loader will be asked for, in the order of the body."""
    content = json.loads(prepared.body)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [prepared.prepared[url] for url in urls]


def test_a_request_without_options_stays_byte_for_byte() -> None:
    document = chat(pictures.image_part(pictures.encode(pictures.shape("red"))))
    prepared = prepare(document)
    assert prepared.body == json.dumps(document).encode()
    assert [path for path, _ in prepared.parts] == ["messages[0].content[0].image_url"]


def test_the_budget_and_the_wish_for_details_leave_the_body() -> None:
    part = pictures.image_part(pictures.encode(pictures.shape("red")))
    prepared = prepare(chat(part, max_image_tokens=99, include_image_details=True, stream=True))
    assert (prepared.max_image_tokens, prepared.include_image_details) == (99, True)
    left = json.loads(prepared.body)
    assert left.keys() == {"messages", "stream", "stream_options"}
    assert left["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_image_tokens", 0), ("max_image_tokens", "9"), ("include_image_details", 1)],
)
def test_a_wrong_request_option_is_named(name: str, value: object) -> None:
    with pytest.raises(ClientError, match=name) as refusal:
        prepare(chat(pictures.text_part("image"), **{name: value}))
    assert refusal.value.param == name


def test_the_pages_of_a_pdf_become_images_in_order() -> None:
    document = chat(
        pictures.text_part("before"),
        file_part(pdf((300, 200), (100, 400))),
        pictures.text_part("?"),
    )
    prepared = prepare(document)
    kinds = [part["type"] for part in json.loads(prepared.body)["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url", "text"]
    images = shown(prepared)
    assert [image.size for image in images] == [(600, 400), (200, 800)]  # at 144 dots an inch
    assert [image.options.frame for image in images] == [0, 1]
    assert prepared.path_of(images[1].url) == "messages[0].content[1].file"


def test_pages_are_chosen_and_options_hold_for_each() -> None:
    data = pdf(*[(100 + page, 100) for page in range(9)])
    images = shown(prepare(chat(file_part(data, pages="9,2-3", max_tokens=50, detail="high"))))
    assert [image.options for image in images] == [
        ImageOptions("high", 50, page) for page in (8, 1, 2)
    ]
    assert [image.size[0] for image in images] == [216, 202, 204]


@pytest.mark.parametrize("dialect", ["input_file", "document"])
def test_files_become_images_in_every_dialect(dialect: str) -> None:
    data = pictures.data_url(pdf((72, 72)), "application/pdf")
    part: dict[str, Any] = {"type": "input_file", "file_data": data}
    if dialect == "document":
        source = {"type": "base64", "media_type": "application/pdf", "data": data[28:]}
        part = {"type": "document", "source": source}
    prepared = prepare({"input": [{"role": "user", "content": [part]}]})
    (image,) = json.loads(prepared.body)["input"][0]["content"]
    url = image["image_url"] if dialect == "input_file" else image["source"]["url"]
    assert image["type"] == ("input_image" if dialect == "input_file" else "image")
    assert prepared.prepared[url].size == (144, 144)


def test_a_large_pdf_is_taken_out_of_the_body_first() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, "PDF", resolution=72)
    assert len(file.getvalue()) > payloads.MIN_PAYLOAD_BYTES
    prepared = prepare(chat(file_part(file.getvalue())))
    assert [image.size for image in shown(prepared)] == [(600, 600)]
    assert prepared.payloads == {}
    bare = {"type": "file", "file": {"file_data": pictures.data_url(file.getvalue())[22:]}}
    assert [image.size for image in shown(prepare(chat(bare)))] == [(600, 600)]


def test_a_page_beyond_the_limits_gets_fewer_pixels() -> None:
    (image,) = shown(prepare(chat(file_part(pdf((9000, 9000))))))
    assert 9_990 <= image.size[0] <= 10_000  # 18000 x 18000 would be over 100 megapixels


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (file_part(b"%PDF-1.7 nothing"), InvalidFile, "damaged"),
        (file_part(b"PK\3\4 a zip file"), InvalidFile, "not a PDF"),
        (file_part(pdf((9, 9)), pages="2"), ImageFrameMissing, "1 pages, and no page 2"),
        (file_part(pdf(*[(9, 9)] * 5)), TooManyImages, "5 pages, the limit is 4"),
        (file_part(pdf((9, 9)), pages="1,1,1,1,1"), TooManyImages, "5 pages were asked for"),
        (pictures.image_part(gif(3), frames=6), ClientError, "frames"),
    ],
)
def test_what_a_file_cannot_give_is_refused(
    part: dict[str, Any], error: type[ClientError], message: str
) -> None:
    if "frames" in part:
        part["image_url"]["frames"] = part.pop("frames")
    with pytest.raises(error, match=message) as refusal:
        prepare(chat(part))
    assert refusal.value.param is not None
    assert refusal.value.param.startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    ("frames", "chosen"), [(1, [0]), (3, [0, 4, 9]), (5, [0, 2, 4, 7, 9]), ([7, 2], [7, 2])]
)
def test_frames_of_an_animation_are_spread_or_named(frames: Any, chosen: list[int]) -> None:
    part = pictures.image_part(gif(10))
    part["image_url"]["frames"] = frames
    assert [image.options.frame for image in shown(prepare(chat(part)))] == chosen


def test_a_still_picture_has_one_frame() -> None:
    part = pictures.image_part(pictures.encode(pictures.shape("red")))
    part["image_url"]["frames"] = 4
    assert [image.options.frame for image in shown(prepare(chat(part)))] == [0]


def test_images_are_counted_with_pages() -> None:
    image = pictures.image_part(pictures.encode(pictures.shape("red")))
    pages = file_part(pdf((9, 9), (9, 9), (9, 9)))
    prepare(chat(*[image] * 5, pages))
    with pytest.raises(TooManyImages, match="more than 8 images"):
        prepare(chat(*[image] * 6, pages))
    with pytest.raises(TooManyImages):
        prepare(chat(*[image] * 9))


def test_stored_requests_cannot_hold_what_is_prepared() -> None:
    with pytest.raises(ClientError, match="while responses are stored"):
        prepare(chat(file_part(pdf((9, 9)))), stored=True)


def test_frames_of_a_named_image_are_refused() -> None:
    part = {**pictures.image_part(gif(3)), "uuid": "U"}
    part["image_url"]["frames"] = 2
    with pytest.raises(ClientError, match="uuid"):
        prepare(chat(part))
