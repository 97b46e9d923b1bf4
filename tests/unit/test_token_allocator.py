"""The cap reported as the one that made an image smaller."""

import asyncio

import pytest

from server.engine.token_allocator import Cap, Crowd, TokenAllocator
from server.errors import InvalidImage
from server.imaging.encoded import Crop, EncodedImage, ImageOptions
from server.imaging.header import ImageHeader
from server.imaging.sizing import NativeResolution
from server.imaging.tokens import Count, MeasuredTokens, TokenRule
from server.imaging.tokens.native import QwenTokens

NATIVE = QwenTokens(NativeResolution(28, 56 * 56, 28 * 28 * 16384))
MEASURED = MeasuredTokens(lambda width, height: Count(*[width * height // 28**2] * 2))
# 100 tokens under both rules.
SIDE = 280


def image(options: ImageOptions) -> EncodedImage:
    return EncodedImage(b"", "", ImageHeader("PNG", SIDE, SIDE, 1, False), options)


@pytest.mark.parametrize("rule", [NATIVE, MEASURED], ids=["native", "measured"])
@pytest.mark.parametrize(
    ("server", "budget", "options", "named"),
    [
        (None, None, ImageOptions(), "none"),
        (200, 200, ImageOptions(max_tokens=200), "none"),
        (50, None, ImageOptions(), "server"),
        (50, None, ImageOptions(max_tokens=80), "server"),
        (80, None, ImageOptions(max_tokens=50), "image"),
        (None, None, ImageOptions(max_tokens=50), "image"),
        (None, 50, ImageOptions(), "request"),
    ],
)
def test_the_effective_cap_is_reported(
    rule: TokenRule, server: int | None, budget: int | None, options: ImageOptions, named: Cap
) -> None:
    allocator, shown = TokenAllocator(lambda _: rule, server), image(options)
    (got,) = asyncio.run(allocator.allocate([shown], budget, {}))
    if got is None:  # an image without a limit is not measured
        assert named == "none"
        return
    assert (got.tokens < 100) == (named != "none")
    assert allocator.effective_cap(shown, got, budget, {}) == named


@pytest.mark.parametrize(
    ("server", "budget", "options", "named"),
    [
        (80, 50, ImageOptions(), "request"),
        (50, 80, ImageOptions(), "server"),
        (None, 50, ImageOptions(max_tokens=80), "request"),
        (90, 80, ImageOptions(max_tokens=50), "image"),
    ],
)
def test_the_tightest_of_several_caps_is_reported(
    server: int | None, budget: int, options: ImageOptions, named: Cap
) -> None:
    allocator, shown = TokenAllocator(lambda _: NATIVE, server), image(options)
    (got,) = asyncio.run(allocator.allocate([shown], budget, {}))
    assert got is not None
    assert allocator.effective_cap(shown, got, budget, {}) == named


def test_one_of_several_views_keeps_its_tokens_in_a_budget() -> None:
    """A small crop would get next to nothing beside a whole picture, by their areas."""
    allocator = TokenAllocator(lambda _: NATIVE, None)
    tokens = []
    for least in (None, 6):
        crop = ImageOptions(max_tokens=6, crop=Crop((0, 0, 84, 56), (SIDE, SIDE)), least=least)
        images = [image(crop), image(ImageOptions())]
        allocated = asyncio.run(allocator.allocate(images, 60, {}))
        tokens.append([each.tokens for each in allocated if each is not None])
    (few, _), (kept, rest) = tokens
    assert few < kept == 6
    assert 40 < rest <= 54


def test_an_image_that_cannot_be_measured_is_named() -> None:
    def count(width: int, height: int) -> Count:
        if width < SIDE:
            raise InvalidImage("the model does not accept this image")
        return Count(100, 100)

    narrow = ImageHeader("PNG", SIDE - 1, SIDE, 1, False)
    images = [
        EncodedImage(b"", "", header, ImageOptions(max_tokens=100), path)
        for header, path in ((image(ImageOptions()).header, "first"), (narrow, "second"))
    ]
    allocator = TokenAllocator(lambda _: MeasuredTokens(count), None)
    with pytest.raises(InvalidImage) as refused:
        asyncio.run(allocator.allocate(images, None, {}))
    assert refused.value.param == "second"


def test_the_images_of_a_crowd_have_a_rule_of_their_own() -> None:
    crowded = MeasuredTokens(lambda width, height: Count(50, 50))
    allocator = TokenAllocator(lambda _: MEASURED, 200, Crowd(2, lambda _: crowded))
    for count, tokens in ((1, 100), (2, 100), (3, 50)):
        images = [image(ImageOptions())] * count
        allocated = asyncio.run(allocator.allocate(images, None, {}))
        assert [each and each.tokens for each in allocated] == [tokens] * count
