"""The client's pictures, documents, videos and boxes, without a server."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from saccade_client import boxes, media, shrink
from saccade_client.answers import ImageCost, ShownImage
from saccade_client.boxes import Box, Point
from saccade_client.client import Client
from saccade_client.errors import SaccadeError, UnusableMedia
from saccade_client.flow import Flow, Work
from saccade_client.media import Document, Picture, Video
from saccade_client.prepare import Asked, Prepared, Preparer
from tests import pictures
from tests.pictures import Size

PHOTO = pictures.photo((1200, 900))
JPEG = pictures.encode(PHOTO, "JPEG", quality=95)
PNG = pictures.encode(pictures.shape("red"))
PDF = b"%PDF-1.7 and so on"
MP4 = b"\0\0\0\x20ftypisom and so on"


# ---------------------------------------------------------------------- sources


@pytest.mark.parametrize("given", ["path", "text", "bytes", "image", "array", "grey", "url"])
def test_a_picture_comes_from_anything(given: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    array = np.asarray(decoded(PNG).convert("RGB"))
    sources: dict[str, Any] = {
        "path": path,
        "text": str(path),
        "bytes": PNG,
        "image": decoded(PNG),
        "array": array,
        "grey": array[:, :, 0],
        "url": "https://example.com/a.png",
    }
    made = media.media(sources[given])
    assert isinstance(made, Picture)
    if given == "url":
        assert made.url == sources["url"]
    else:
        assert shrink.upright_size(made) == (224, 224)


def test_pdfs_and_videos_are_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(PDF)
    (tmp_path / "a.webm").write_bytes(b"\x1a\x45\xdf\xa3")
    named = media.media(tmp_path / "a.pdf")
    assert isinstance(named, Document)
    assert (named.data, named.name) == (PDF, "a.pdf")
    assert isinstance(media.media(PDF), Document)
    for source, kind in {tmp_path / "a.webm": "video/webm", MP4: "video/mp4"}.items():
        made = media.media(source)
        assert isinstance(made, Video)
        assert made.media_type == kind


@pytest.mark.parametrize(
    "source", ["no/such/file.png", "a\0b.png", np.zeros((2, 2, 7)), [1, 2], {"url": "x"}]
)
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(UnusableMedia):
        media.media(source)


@pytest.mark.parametrize(
    ("pages", "expected"), [(None, [0, 1, 2, 3]), ("2", [1]), ("1-2,4", [0, 1, 3])]
)
def test_pages_are_numbered_from_one(pages: str | None, expected: list[int]) -> None:
    assert media.page_numbers(pages, 4) == expected


@pytest.mark.parametrize("pages", ["0", "5", "3-2", "x", "1-", ""])
def test_wrong_pages_are_refused(pages: str) -> None:
    with pytest.raises(UnusableMedia):
        media.page_numbers(pages, 4)


# ---------------------------------------------------------------------- resizing


def picture_of(data: bytes) -> Picture:
    return media.picture(data)


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_resized_photo_is_upright_and_looks_the_same(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(
        np.ascontiguousarray(pictures.STORED_AS[orientation](np.asarray(PHOTO)))
    )
    made = picture_of(pictures.encode(stored, "JPEG", quality=95, exif=exif))
    assert shrink.upright_size(made) == (1200, 900)
    sent = shrink.encoded(made, (1200, 900), (400, 300), 90)
    small = decoded(sent.data)
    assert (small.format, small.size) == ("JPEG", (400, 300))
    assert 0x0112 not in small.getexif()
    expected = PHOTO.resize((400, 300), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean()
    assert difference < 8  # the photo is noisy; turned, it would be 40


def test_lossless_pictures_stay_lossless_and_keep_their_transparency() -> None:
    image = pictures.shape("red").convert("RGBA")
    image.putalpha(128)
    sent = shrink.encoded(picture_of(pictures.encode(image)), (224, 224), (112, 112), 90)
    assert (decoded(sent.data).format, decoded(sent.data).mode) == ("PNG", "RGBA")
    sent = shrink.encoded(media.picture(PHOTO), (1200, 900), (400, 300), 90)
    expected = PHOTO.resize((400, 300), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert np.array_equal(np.asarray(decoded(sent.data)), np.asarray(expected))


def test_a_colour_profile_is_kept() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = picture_of(pictures.encode(PHOTO, "JPEG", icc_profile=profile))
    sent = shrink.encoded(made, (1200, 900), (400, 300), 90)
    assert decoded(sent.data).info["icc_profile"] == profile


@pytest.mark.parametrize("mode", ["P", "CMYK", "I;16"])
def test_odd_modes_are_not_resized(mode: str) -> None:
    image = Image.new(mode, (400, 300))
    file = pictures.encode(image, "TIFF" if mode == "CMYK" else "PNG")
    assert shrink.upright_size(picture_of(file)) is None


def test_damaged_and_growing_pictures_are_sent_as_they_are() -> None:
    damaged = picture_of(JPEG[: len(JPEG) // 2])
    assert shrink.encoded(damaged, (1200, 900), (400, 300), 90).data == damaged.source
    blank = picture_of(pictures.encode(Image.new("RGB", (300, 200))))
    sent = shrink.encoded(blank, (300, 200), (297, 198), 90)
    assert len(sent.data) <= len(blank.source or b"")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what is sent


class Server:
    """Answers as a server whose model sees pictures in `cells` of 32 pixels at most."""

    def __init__(self, cells: int, *, whole: bool = True, odd: bool = False) -> None:
        self._cells, self._whole, self._odd = cells, whole, odd
        self.asked: list[int] = []

    def costs(self, asked: Sequence[Asked], budget: int | None) -> Flow[list[ImageCost]]:
        self.asked.append(len(asked))
        yield Work(lambda: None)
        return [self._cost(size, budget) for size, _, _ in asked]

    def _cost(self, size: Size, budget: int | None) -> ImageCost:
        width, height = size
        scale = min(1, ((budget or self._cells) * 1024 / (width * height)) ** 0.5)
        columns, rows = (max(1, int(side * scale / 32)) for side in size)
        extra = int(self._odd and scale == 1)  # another cost for a picture that fits
        region = (0, 0, width, height) if self._whole else (0, 0, width // 2, height)
        return ImageCost(
            width=width, height=height, processed_width=32 * columns, processed_height=32 * rows,
            region=region, tokens=columns * rows + extra, kv_bytes=0,
        )  # fmt: skip


def prepare(
    preparer: Preparer, server: Server | None, *items: Any, budget: int | None = None
) -> Prepared:
    return prepare_all(preparer, server, [{"role": "user", "content": [*items, "what?"]}], budget)


def prepare_all(
    preparer: Preparer,
    server: Server | None,
    messages: list[dict[str, Any]],
    budget: int | None = None,
) -> Prepared:
    flow = preparer.prepare(
        messages,
        is_saccade=server is not None,
        ask=server.costs if server else None,
        budget=budget,
    )
    result: Any = None
    done: Prepared | None = None
    while done is None:
        try:
            step = flow.send(result)
            assert isinstance(step, Work)
            result = step.call()
        except StopIteration as end:
            done = end.value
    return done


def sent_sizes(prepared: Prepared) -> list[Size | None]:
    return [encoded.sent_size for encoded in prepared.encoded.values()]


def test_large_pictures_are_sent_as_the_model_sees_them() -> None:
    server, preparer = Server(100), Preparer(90)
    assert sent_sizes(prepare(preparer, server, JPEG, PNG)) == [(352, 256), (224, 224)]
    assert server.asked == [1, 1]  # PNG is small; what is sent is asked about too
    assert sent_sizes(prepare(preparer, server, JPEG)) == [(352, 256)]
    assert server.asked == [1, 1]


@pytest.mark.parametrize(
    "server", [None, Server(100, whole=False), Server(100, odd=True), Server(10_000)]
)
def test_pictures_keep_their_size_if_that_would_change_what_the_model_sees(
    server: Server | None,
) -> None:
    prepared = prepare(Preparer(90), server, JPEG)
    assert sent_sizes(prepared) == [(1200, 900)]
    assert [encoded.data for encoded in prepared.encoded.values()] == [JPEG]


def test_a_budget_is_asked_about_for_all_pictures_together() -> None:
    server = Server(10_000)
    prepared = prepare(Preparer(90), server, JPEG, PNG, budget=64)
    assert server.asked == [2, 2]
    assert sent_sizes(prepared) == [(288, 192), (224, 224)]
    url = "https://example.com/a.png"
    assert sent_sizes(prepare(Preparer(90), server, JPEG, media.picture(url), budget=64)) == [
        (1200, 900)
    ]


EXAMPLES = json.loads((Path(__file__).parents[2] / "clients" / "session_keys.json").read_text())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["what"])
def test_a_conversation_has_the_session_that_all_clients_give_it(example: dict[str, Any]) -> None:
    for server in (None, Server(100)):
        prepared = prepare_all(Preparer(90), server, example["messages"])
        assert prepared.session == example["key"]


def test_a_picture_has_one_session_in_whatever_form_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    given = (PNG, path, media.picture(url), media.picture(PNG, detail="low"), part)
    found = [prepare(Preparer(90), Server(100), each, JPEG).session for each in given]
    assert found == [hashlib.sha256(PNG).hexdigest()[:32]] * len(given)


def test_details_are_in_pixels_of_the_callers_picture() -> None:
    document = Document(PDF)
    prepared = prepare(Preparer(90), Server(100), document, JPEG)
    pages = [shown((100, 100), frame) for frame in (0, 1, 2)]
    found = prepared.images([*pages, shown((352, 256))])
    assert found[:3] == pages
    assert (found[3].width, found[3].height, found[3].region) == (1200, 900, (0, 0, 1200, 900))


def shown(size: Size, frame: int = 0) -> ShownImage:
    width, height = size
    return ShownImage(
        width=width, height=height, region=(0, 0, width, height), frame=frame,
        processed_width=width, processed_height=height,
    )  # fmt: skip


def test_a_named_picture_is_sent_once() -> None:
    prepared = prepare(Preparer(90), Server(100), PNG)
    names = prepared.names()
    (name,) = names
    part = prepared.written(names)[0]["content"][0]
    assert part["uuid"] == name
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    part = prepared.written(names, names)[0]["content"][0]
    assert part == {"type": "image_url", "image_url": {}, "uuid": name}


def test_other_servers_get_only_what_the_api_has() -> None:
    capped = media.picture(PNG, detail="low", max_tokens=10, frames=2)
    (part, _) = prepare(Preparer(90), None, capped).written()[0]["content"]
    assert set(part["image_url"]) == {"url", "detail"}
    (part, _) = prepare(Preparer(90), Server(100), capped).written()[0]["content"]
    assert set(part["image_url"]) == {"url", "detail", "max_tokens", "frames"}


# ---------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at [100, 200, 300.5, 400]", [Box(100, 200, 300.5, 400)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a cup"}]', [Box(1, 2, 3, 4, "a cup")]),
        (
            '[{"label": "a", "bbox_2d": [1,2,3,4]}, {"label": "b", "bbox_2d": [5,6,7,8]}]',
            [Box(1, 2, 3, 4, "a"), Box(5, 6, 7, 8, "b")],
        ),
        ("<box>(1,2),(3,4)</box>", [Box(1, 2, 3, 4, scale=1000)]),
        ("[1, 2, 3] and [1, 2, 3, 4, 5]", []),
        ("[" * 50_000, []),
        ("{" * 50_000 + "[1,2,3,4]", [Box(1, 2, 3, 4)]),
    ],
)
def test_boxes_are_found_in_text(text: str, expected: list[Box]) -> None:
    assert boxes.find(text) == expected


def test_boxes_are_mapped_to_the_original() -> None:
    seen = ShownImage(
        width=1000, height=500, region=(100, 0, 900, 500), processed_width=400, processed_height=250
    )
    box = Box(250, 500, 500, 1000, "x")
    assert boxes.to_original(box, seen) == Box(300, 250, 500, 500, "x")
    assert boxes.to_original(Box(100, 125, 200, 250), seen, None) == Box(300, 250, 500, 500)
    assert boxes.to_original(Box(0, 0, 1, 1), seen, 1) == Box(100, 0, 900, 500)
    assert boxes.to_original(Box(0, 0, 512, 1024, scale=1024), seen, 1) == Box(100, 0, 500, 500)
    assert boxes.point_to_original(Point(50, 10, "x", 100), seen) == Point(500, 50, "x")
    assert boxes.point_to_original(Point(200, 125), seen, None) == Point(500, 250)


def test_boxes_are_drawn() -> None:
    drawn = boxes.draw(PNG, [Box(50, 60, 150, 160, "here"), Box(300, 40, -20, 10)])
    assert drawn.size == (224, 224)
    assert drawn.getpixel((50, 120)) == (0xE6, 0x19, 0x4B)


def test_an_api_key_that_cannot_be_sent_is_an_error() -> None:
    for key in ("sk-ä", "sk-\n"):
        with pytest.raises(SaccadeError, match="API key"):
            Client("http://127.0.0.1:1/v1", key)
