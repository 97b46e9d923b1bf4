"""Loading a request's media: files and animations become images, and uuids are remembered."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.errors import (
    ClientError,
    FilesDisabled,
    ImageFrameMissing,
    ImageUrlBlocked,
    InvalidFile,
    InvalidImage,
    SaccadeError,
    TooManyImages,
    UnknownImage,
    UnsupportedImageFormat,
    VideoTooLarge,
)
from server.imaging.encoded import ImageOptions
from server.imaging.sampling import SamplingOptions
from server.imaging.video.limits import VideoLimits
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.load import MediaLoader
from server.request import payloads
from server.request.budgets import Budgets, Holdings, Item, Resource
from server.request.context import RequestContext
from server.telemetry.record import Record
from tests import pictures
from tests.encoded_videos import video
from tests.media import (
    LIMITS,
    InProcess,
    chat,
    file_part,
    gif,
    media_loader,
    pdf,
    prepare,
    read,
)

RED = pictures.encode(pictures.shape("red"))
PDF_URL = pictures.data_url(pdf((72, 72)), "application/pdf")


def test_the_pages_of_a_pdf_become_images_in_order() -> None:
    document = chat(
        pictures.text_part("before"),
        file_part(pdf((300, 200), (100, 400))),
        pictures.text_part("?"),
    )
    prepared = prepare(document)
    assert [part["type"] for part in prepared.content()] == [
        "text", "image_url", "image_url", "text",
    ]  # fmt: skip
    images = prepared.shown()
    assert [image.size for image in images] == [(600, 400), (200, 800)]  # at 144 dots an inch
    assert [image.options.frame for image in images] == [0, 1]
    assert {image.path for image in images} == {"messages[0].content[1].file"}


def test_pages_are_selected_and_each_gets_the_options() -> None:
    data = pdf(*[(100 + page, 100) for page in range(9)])
    images = prepare(chat(file_part(data, pages="9,2-3", max_tokens=50, detail="high"))).shown()
    assert [image.options for image in images] == [
        ImageOptions("high", 50, page) for page in (8, 1, 2)
    ]
    assert [image.size[0] for image in images] == [216, 202, 204]


@pytest.mark.parametrize(
    ("path", "key", "part"),
    [
        ("/v1/responses", "input", {"type": "input_file", "file_data": PDF_URL}),
        ("/v1/messages", "messages",
         {"type": "document", "source": {"type": "base64", "data": PDF_URL[28:]}}),
        ("/v1/messages", "messages",
         {"type": "image", "source": {"type": "base64", "data": PDF_URL[28:]}}),
        ("/v1/chat/completions", "messages", {"type": "image_url", "image_url": {"url": PDF_URL}}),
    ],
)  # fmt: skip
def test_a_pdf_becomes_images_in_every_dialect(path: str, key: str, part: dict[str, Any]) -> None:
    prepared = prepare({key: [{"role": "user", "content": [part]}]}, path)
    (image,) = prepared.content(key)
    url = image.get("image_url") or image["source"]["url"]
    handle = url["url"] if isinstance(url, dict) else url
    assert prepared.image(handle).size == (144, 144)


def test_an_image_may_be_sent_as_a_file() -> None:
    part = {"type": "file", "file": {"file_data": pictures.data_url(RED)}}
    (image,) = prepare(chat(part)).shown()
    assert image.data == RED


def test_a_large_pdf_is_extracted_before_the_body_is_parsed() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    data = pictures.encode(noise, "PDF", resolution=72)
    assert len(data) > payloads.MIN_PAYLOAD_BYTES
    bare = {"type": "file", "file": {"file_data": pictures.data_url(data)[22:]}}
    for part in (file_part(data), bare):
        found = read(chat(part))
        assert len(found.payloads.small) < 1000
        assert [image.size for image in prepare(chat(part)).shown()] == [(600, 600)]


def test_a_page_beyond_the_pixel_limit_is_rendered_smaller() -> None:
    (image,) = prepare(chat(file_part(pdf((9000, 9000))))).shown()
    assert 9_990 <= image.size[0] <= 10_000  # 18000 x 18000 would be over 100 megapixels


def framed(frames: Any, data: bytes | None = None) -> dict[str, Any]:
    part = pictures.image_part(gif(10) if data is None else data)
    part["image_url"]["frames"] = frames
    return part


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (file_part(b"%PDF-1.7 nothing"), InvalidFile, "damaged"),
        (file_part(b"PK\3\4 a zip file"), UnsupportedImageFormat, "format"),
        (
            file_part(pdf((9, 9)), pages="2"),
            ImageFrameMissing,
            "page 2 does not exist",
        ),
        (file_part(pdf(*[(9, 9)] * 5)), TooManyImages, "5 pages, the limit is 4"),
        (file_part(pdf((9, 9)), pages="1,1,1,1,1"), TooManyImages, "more than 4 pages"),
        (file_part(RED, pages="1"), InvalidFile, "has no pages"),
        ({**pictures.image_part(pdf((9, 9))), "uuid": "U"}, InvalidFile, "uuid"),
        (framed(6), TooManyImages, "more than 5 frames"),
        (framed([0] * 6), TooManyImages, "more than 5 frames"),
        (pictures.image_part(b""), ClientError, "empty"),
        (pictures.image_part(RED[:20]), InvalidImage, "."),
    ],
)
def test_invalid_files_and_options_are_refused(
    part: dict[str, Any], error: type[ClientError], message: str
) -> None:
    with pytest.raises(error, match=message) as refusal:
        prepare(chat(pictures.text_part("a"), part))
    assert (refusal.value.param or "").startswith("messages[0].content[1].")


@pytest.mark.parametrize(("frames", "error"), [(10**18, TooManyImages), (10**4000, ClientError)])
def test_the_error_for_a_huge_number_of_frames_is_short(
    frames: int, error: type[ClientError]
) -> None:
    with pytest.raises(error) as refusal:
        prepare(chat(framed(frames)))
    assert len(refusal.value.message) < 100


@pytest.mark.parametrize(
    ("frames", "chosen"),
    [(1, [0]), (3, [0, 4, 9]), (5, [0, 2, 4, 7, 9]), ([7, 2], [7, 2]), (None, [0])],
)
def test_frames_of_an_animation_are_selected_by_count_or_number(
    frames: Any, chosen: list[int]
) -> None:
    assert [image.options.frame for image in prepare(chat(framed(frames))).shown()] == chosen


def test_frames_of_a_pdf_select_its_pages() -> None:
    images = prepare(chat(framed(2, pdf(*[(9, 9)] * 9)))).shown()
    assert [image.options.frame for image in images] == [0, 8]


def test_a_still_picture_has_one_frame() -> None:
    assert [image.options.frame for image in prepare(chat(framed(4, RED))).shown()] == [0]


def test_pages_count_towards_the_image_limit() -> None:
    image, pages = pictures.image_part(RED), file_part(pdf((9, 9), (9, 9), (9, 9)))
    prepare(chat(*[image] * 5, pages))
    with pytest.raises(TooManyImages, match="more than 8 images"):
        prepare(chat(*[image] * 6, pages))


# ---------------------------------------------------------------------- names


def in_group(group: str, document: Any) -> RequestContext:
    found = read(document)
    found.context.record.key_group = group
    return found.context


def test_a_uuid_is_known_only_in_its_group() -> None:
    loader = media_loader()
    named = {**pictures.image_part(RED), "uuid": "U"}
    again = {"type": "image_url", "image_url": None, "uuid": "U", "max_tokens": 5}

    async def run() -> None:
        await loader.load(in_group("a", chat(named)))
        context = in_group("a", chat(again))
        await loader.load(context)
        (image,) = context.media[0].images
        assert (image.size, image.data) == ((224, 224), b"")
        assert image.options == ImageOptions(max_tokens=5)
        with pytest.raises(UnknownImage) as refusal:
            await loader.load(in_group("b", chat(again)))
        assert refusal.value.param == "messages[0].content[0].uuid"

    asyncio.run(run())


def test_the_error_names_the_right_part_for_similar_urls() -> None:
    """Also if a part's URL is the end of another part's, or both are equal."""
    good, bad = pictures.image_part(RED), pictures.image_part(RED[:20])
    unknown = {"type": "image_url", "image_url": None, "uuid": good["image_url"]["url"][-9:]}
    for parts, index in (((good, bad), 1), ((bad, bad), 0), ((good, unknown), 1)):
        with pytest.raises(ClientError) as refusal:
            prepare(chat(*parts))
        assert (refusal.value.param or "").startswith(f"messages[0].content[{index}].")


# ---------------------------------------------------------------------- sources


def test_uploads_are_refused_without_a_folder() -> None:
    part = {"type": "image_url", "image_url": {"file_id": "file-" + "0" * 32}}
    with pytest.raises(FilesDisabled) as refusal:
        prepare(chat(part))
    assert refusal.value.param == "messages[0].content[0].image_url"


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_local_files_are_blocked_by_default(kind: str) -> None:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(ImageUrlBlocked) as refusal:
        prepare(chat(part))
    assert refusal.value.param == f"messages[0].content[0].{kind}_url"


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": pictures.data_url(data, "video/mp4")}}


def test_the_header_of_a_video_is_read() -> None:
    (ref,) = prepare(chat(video_part(video()))).context.media
    assert ref.data == video()
    assert ref.video is not None
    assert (ref.video.size, ref.video.frame_count) == ((64, 48), 12)


def test_a_file_part_is_a_video_if_its_file_is_one() -> None:
    url = pictures.data_url(video(), "application/octet-stream")
    part = {"type": "file", "file": {"file_data": url, "fps": 3, "max_tokens": 90}}
    (ref,) = prepare(chat(part)).context.media
    assert (ref.kind, ref.images, ref.data) == ("video", [], video())
    assert ref.sampling == SamplingOptions(fps=3, max_tokens=90)
    part["file"]["pages"] = "1"
    with pytest.raises(InvalidFile, match="no pages"):
        prepare(chat(part))


def test_a_file_that_is_a_video_is_refused_where_the_model_takes_none() -> None:
    limits = replace(LIMITS, max_clips={})
    loader = MediaLoader(
        Fetcher(FetchSettings()), limits, None, None, Expander(InProcess(), limits)
    )
    part = {"type": "file", "file": {"file_data": pictures.data_url(video(), "image/png")}}
    with pytest.raises(ClientError, match="takes no video") as refusal:
        prepare(chat(part), loader=loader)
    assert refusal.value.param == "messages[0].content[0].file"


def test_files_that_are_videos_count_as_videos() -> None:
    part = {"type": "file", "file": {"file_data": pictures.data_url(video(), "a/b")}}
    with pytest.raises(TooManyImages, match="more than 2 video parts"):
        prepare(chat(part, video_part(video()), part))


def test_a_named_video_is_known_without_its_file_in_its_group() -> None:
    loader = media_loader()
    sent = {**video_part(video()), "uuid": "U"}
    (first,) = prepare(chat(sent), loader=loader).context.media
    again = chat({"type": "video_url", "video_url": {"max_tokens": 9}, "uuid": "U"})
    (ref,) = prepare(again, loader=loader).context.media
    assert (ref.data, ref.digest, ref.video) == (b"", first.digest, first.video)
    other = read(again).context
    other.record.key_group = "other"
    with pytest.raises(UnknownImage):
        asyncio.run(loader.load(other))


class Peak(Budgets):
    """Notes the most memory that was held at a time."""

    most = 0

    def add(self, item: Item, amount: int) -> None:
        super().add(item, amount)
        self.most = max(self.most, self.held[Resource.MEDIA])


def test_the_memory_for_the_pictures_of_a_video_is_held_while_they_are_joined() -> None:
    budgets = Peak({Resource.MEDIA: 1 << 20, Resource.IMAGE_TOKENS: 0}, 1.0)
    files = [pictures.encode(pictures.shape(color), "JPEG") for color in ("red", "blue")]
    series = [pictures.data_url(file, "image/jpeg") for file in files]
    context = read(chat({"type": "video", "video": series})).context
    permit: Any = SimpleNamespace(holdings=Holdings(budgets))
    context.permit = permit
    asyncio.run(media_loader().load(context))
    nbytes = sum(map(len, files))
    assert budgets.held[Resource.MEDIA] == nbytes
    assert budgets.most >= 2 * nbytes


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(64 * 47, 60, 1000), "64x48 = 3072 pixels per frame, the limit is 3008 pixels"),
        (VideoLimits(64 * 48, 0.4, 1000), r"takes 0\.5 s, the limit is 0\.4 s"),
        (VideoLimits(64 * 48, 60, 11), "has 12 frames, the limit is 11"),
    ],
)
def test_videos_beyond_a_limit_are_refused_by_their_header(
    limits: VideoLimits, message: str
) -> None:
    strict = replace(LIMITS, video=limits)
    loader = MediaLoader(
        Fetcher(FetchSettings()), strict, None, None, Expander(InProcess(), LIMITS)
    )
    with pytest.raises(VideoTooLarge, match=message) as refusal:
        prepare(chat(video_part(video())), loader=loader)
    assert refusal.value.param == "messages[0].content[0].video_url"
    assert refusal.value.status == 413


class Counting(InProcess):
    """Counts how many files are inspected at a time."""

    running = most = 0

    async def count_frames(self, data: bytes, record: object) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(5 if len(data) > 2_000 else 0.05)
        finally:
            self.running -= 1
        raise SaccadeError("no frames")


def loader_with(inspector: Any) -> MediaLoader:
    expander = Expander(inspector, LIMITS)
    return MediaLoader(Fetcher(FetchSettings()), LIMITS, None, None, expander)


def test_pages_are_counted_before_any_is_read_for_its_text() -> None:
    class Reading(InProcess):
        pages = 0

        async def pdf_text(self, *page: object) -> str:
            self.pages += 1
            return ""

    reading = Reading()
    pages = [(60, 40)] * LIMITS.max_pages
    part = file_part(pdf(*pages), include_text=True)
    few = LIMITS.max_images // len(pages)
    with pytest.raises(TooManyImages):
        prepare(chat(*[part] * (few + 1)), loader=loader_with(reading))
    assert reading.pages == 0
    prepare(chat(*[part] * few), loader=loader_with(reading))
    assert reading.pages == LIMITS.max_images


def test_parts_load_concurrently_and_an_error_cancels_the_rest() -> None:
    counting = Counting()
    slow = pictures.encode(
        pictures.photo((64, 64)), "GIF", save_all=True, append_images=[pictures.photo((64, 64), 1)]
    )
    parts: Sequence[dict[str, Any]] = [framed(3), framed(3, slow), framed(3, slow)]
    started = time.monotonic()
    with pytest.raises(SaccadeError, match="no frames"):
        prepare(chat(*parts), loader=loader_with(counting))
    assert counting.most == 3
    assert counting.running == 0
    assert time.monotonic() - started < 4  # it did not wait for the slow parts


def test_a_context_without_media_loads_nothing() -> None:
    record = Record()
    asyncio.run(media_loader().load(RequestContext(record)))
    assert list(record.timeline.image_segments(math.inf)) == []  # a fetch would be one
