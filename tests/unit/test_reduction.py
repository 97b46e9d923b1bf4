"""Pictures are reduced to what has detail: blocks, plans, and the views of images."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from server.errors import UnknownImage
from server.imaging import detail
from server.imaging.encoded import EncodedImage, ImageOptions, encoded
from server.imaging.reduction import MAX_CROPS, Box, Reduction, Shown, plan
from server.imaging.sizing import Size
from server.ingest.reduce import Reducer
from server.request.context import RequestContext
from server.telemetry.record import Record
from server.workers.jobs import FindDetail
from tests.media import LIMITS
from tests.pictures import encode, photo

PAGE = (1600, 1200)
FAR = [(100, 100, 300, 160), (1300, 1000, 1500, 1100)]


def page(*boxes: Box, size: Size = PAGE, frame: bool = False) -> Image.Image:
    """A white page with hatched boxes, which have detail everywhere."""
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    if frame:
        pen.rectangle((4, 4, size[0] - 5, size[1] - 5), outline="black", width=2)
    for left, top, right, bottom in boxes:
        for x in range(left, right, 8):
            pen.line((x, top, x, bottom - 1), fill="black", width=3)
    return image


def tokens(size: Size) -> int:
    """Qwen3-VL's, without its limits."""
    return max(1, round(size[0] / 32)) * max(1, round(size[1] / 32))


def total(views: list[Shown], size: Size) -> int:
    return sum(
        min(
            tokens(size if view.box is None else _size(view.box)),
            10**9 if view.max_tokens is None else view.max_tokens,
        )
        for view in views
    )


def _size(box: Box) -> Size:
    return box[2] - box[0], box[3] - box[1]


def _covers(outer: Box, inner: Box) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and outer[2] >= inner[2]
        and outer[3] >= inner[3]
    )


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("frame", [False, True])
def test_blocks_are_where_the_detail_is(frame: bool) -> None:
    image = page(*FAR, frame=frame)
    found = sorted(detail.blocks(image).tolist())
    assert len(found) == 2
    for box, expected in zip(found, FAR, strict=True):
        assert np.abs(np.subtract(box, expected)).max() <= 6


def test_blank_and_noisy_pages_have_no_blocks() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(240, 4, (600, 800, 1)).clip(0, 255).astype(np.uint8).repeat(3, axis=2)
    specks = Image.new("RGB", (800, 600), "white")
    specks.putpixel((400, 300), (0, 0, 0))
    for image in (Image.new("RGB", (800, 600), "gray"), Image.fromarray(noise), specks):
        assert detail.blocks(image).shape == (0, 4)


def test_a_strong_pattern_is_detail_everywhere() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    for image in (Image.fromarray(noise), page((0, 0, 800, 600), size=(800, 600))):
        (box,) = detail.blocks(image).tolist()
        assert _covers(tuple(box), (8, 8, 792, 592))


def test_the_number_of_blocks_is_limited_and_all_detail_is_in_one() -> None:
    boxes = [(x, y, x + 16, y + 16) for x in range(20, 1000, 90) for y in range(20, 1000, 90)]
    found = detail.blocks(page(*boxes, size=(1024, 1024)))
    assert 0 < len(found) <= detail.MAX_BLOCKS
    for box in boxes:
        assert any(_covers(tuple(np.add(each, (-8, -8, 8, 8))), box) for each in found.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_soft_photos_are_whole_and_not_blank(seed: int) -> None:
    size = (800, 600)
    soft = photo(size, seed).filter(ImageFilter.GaussianBlur(8))
    for image in (photo(size, seed), soft):
        blocks = [tuple(box) for box in detail.blocks(image).tolist()]
        left, top, right, bottom = (
            pick(sides)
            for pick, sides in zip((min, min, max, max), zip(*blocks, strict=True), strict=True)
        )
        assert (right - left) * (bottom - top) > 0.8 * 800 * 600
    page = Image.new("RGB", PAGE, "white")
    page.paste(soft.resize((400, 300)), (1000, 200))
    (view,) = plan("trim", PAGE, [tuple(box) for box in detail.blocks(page).tolist()], 1, None)
    assert view.box is not None
    assert _covers(view.box, (1010, 210, 1390, 490))


def test_shapes_that_are_as_bright_as_the_background_are_detail() -> None:
    page = Image.new("RGB", (800, 600), (128, 128, 128))
    page.paste((128, 100, 222), (200, 200, 300, 300))
    ((left, top, right, bottom),) = detail.blocks(page).tolist()
    assert (left, top, right, bottom) == (200, 200, 300, 300)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (7, 3)])
def test_tiny_pictures_have_no_blocks(size: Size) -> None:
    assert detail.blocks(Image.new("RGB", detail.looked_at(size))).shape == (0, 4)


# ---------------------------------------------------------------------- plans


def test_a_page_is_trimmed_to_the_box_around_its_detail() -> None:
    (view,) = plan("trim", PAGE, FAR[:1], 9, tokens)
    assert view.box is not None
    assert _covers(view.box, FAR[0])
    assert [side % 32 for side in _size(view.box)] == [0, 0]
    assert tokens(_size(view.box)) < 0.03 * tokens(PAGE)
    assert plan("trim", PAGE, [(10, 10, 1590, 1190)], 9, tokens) == [Shown(None)]
    assert plan("trim", PAGE, FAR[:1], 9, None) == [Shown(view.box)]


def test_blocks_that_are_far_from_each_other_become_crops_after_an_overview() -> None:
    overview, *crops = plan("salient", PAGE, FAR, 9, tokens)
    assert overview.box is None
    assert overview.max_tokens == tokens(PAGE) // 8
    assert len(crops) == 2
    for crop, block in zip(crops, FAR, strict=True):
        assert crop.box is not None
        assert _covers(crop.box, block)
        assert crop.max_tokens == tokens(_size(crop.box))


def test_one_block_needs_no_overview() -> None:
    assert plan("salient", PAGE, FAR[:1], 9, tokens) == plan("trim", PAGE, FAR[:1], 9, tokens)


@pytest.mark.parametrize("room", [1, 2])
def test_without_room_for_crops_a_picture_is_trimmed(room: int) -> None:
    assert plan("salient", PAGE, FAR, room, tokens) == plan("trim", PAGE, FAR, room, tokens)


@pytest.mark.parametrize("reduction", ["whole", "trim", "salient"])
def test_no_plan_takes_more_tokens_or_views_than_allowed(reduction: Reduction) -> None:
    random = np.random.default_rng(1)
    for cap in (1, 3, 16, 40, 300, 5000):
        for _ in range(40):
            starts = random.integers(0, (1500, 1100), (random.integers(0, 32), 2))
            sizes = random.integers(1, 400, starts.shape)
            ends = np.minimum(starts + sizes, PAGE)
            blocks = [(*a, *b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
            room = int(random.integers(0, 12))
            views = plan(
                reduction, PAGE, blocks, room, lambda size, cap=cap: min(cap, tokens(size))
            )
            assert 1 <= len(views) <= max(1, min(room, MAX_CROPS + 1))
            assert total([Shown(v.box, min(v.max_tokens or cap, cap)) for v in views], PAGE) <= max(
                cap, 16
            )
            for view in views:
                assert view.box is None or _covers((0, 0, *PAGE), view.box)


@pytest.mark.parametrize("share", [1, 4, 15, 30, 60, 300])
def test_the_views_of_a_picture_keep_to_its_share_of_a_budget(share: int) -> None:
    views = plan("salient", PAGE, FAR, 9, tokens, share)
    if len(views) == 1:
        assert views == plan("trim", PAGE, FAR, 9, tokens)
    else:
        assert total(views, PAGE) <= share
        assert min(view.max_tokens or 0 for view in views) >= 4
    assert len(views) == (1 if share < 30 else 3)


def test_a_blank_page_takes_few_tokens() -> None:
    assert plan("salient", PAGE, [], 9, tokens) == [Shown(None, 16)]
    assert plan("trim", PAGE, [], 9, None) == [Shown(None)]
    assert plan("whole", PAGE, [], 9, tokens) == [Shown(None)]


# ---------------------------------------------------------------------- images


class Finder:
    """Looks for detail in this process, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    async def find_detail(self, key: str, data: bytes, job: FindDetail, record: Record) -> Any:
        import io

        self.calls += 1
        image = Image.open(io.BytesIO(data)).resize(job.resize or job.size)
        return [tuple(box) for box in detail.blocks(image).tolist()]


def reduced(
    options: ImageOptions, *, auto: Reduction = "whole", room: int = 9, times: int = 1
) -> tuple[list[EncodedImage], Finder]:
    finder = Finder()
    reducer = Reducer(finder, auto, lambda size, _: tokens(size))
    image = replace(encoded(encode(page(*FAR)), LIMITS.image), options=options)

    async def run() -> list[EncodedImage]:
        for _ in range(times):
            found = await reducer.reduce([image], RequestContext(Record()), room)
        return found

    return asyncio.run(run()), finder


def test_the_policy_is_that_of_the_image_or_else_the_servers_for_auto() -> None:
    assert len(reduced(ImageOptions())[0]) == 1
    assert len(reduced(ImageOptions(), auto="salient")[0]) == 3
    assert len(reduced(ImageOptions(detail="high"), auto="salient")[0]) == 1
    assert len(reduced(ImageOptions(reduction="salient"))[0]) == 3
    (trimmed,) = reduced(ImageOptions(reduction="trim"), auto="salient")[0]
    assert trimmed.options.crop is not None


def test_views_are_crops_of_the_same_file() -> None:
    images, finder = reduced(ImageOptions(reduction="salient", max_tokens=90, frame=0), times=3)
    assert finder.calls == 1  # and remembered
    overview, first, second = images
    assert overview.size == PAGE
    assert {image.digest for image in images} == {overview.digest}
    assert all(image.options.max_tokens is not None for image in images)
    assert all(image.options.least == image.options.max_tokens for image in images)
    for image, block in zip((first, second), FAR, strict=True):
        crop = image.options.crop
        assert crop is not None
        assert crop.of == PAGE
        assert image.size == crop.size
        assert _covers(crop.box, block)
        whole = (0.0, 0.0, *map(float, image.size))
        assert image.options.in_original(whole) == crop.box
        assert image.options.original(image.size) == PAGE


def test_an_image_without_data_needs_remembered_detail() -> None:
    reducer = Reducer(Finder(), "trim", lambda size, _: tokens(size))
    image = encoded(encode(page(*FAR)), LIMITS.image)

    async def run() -> list[EncodedImage]:
        context = RequestContext(Record())
        with pytest.raises(UnknownImage):
            await reducer.reduce([replace(image, data=b"")], context, 1)
        await reducer.reduce([image], context, 1)
        return await reducer.reduce([replace(image, data=b"")], context, 1)

    (view,) = asyncio.run(run())
    assert view.options.crop is not None
