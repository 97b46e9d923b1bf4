"""The arithmetic of decode sizes, against tables and against the processors' own functions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from server.imaging import sizing
from server.imaging.sizing import (
    BestGrid,
    FixedSize,
    LongestEdge,
    NativeResolution,
    ShortestEdge,
    jpeg_scale,
)

SIDES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        ((4000, 3000), (1148, 840), 2),
        ((4000, 3000), (1000, 750), 4),
        ((4000, 3000), (1001, 750), 2),
        ((4001, 3001), (501, 376), 8),
        ((800, 600), (800, 600), 1),
        ((8000, 100), (100, 100), 1),
        ((224, 224), (448, 448), 1),
        ((4000, 3000), None, 1),
    ],
)
def test_the_jpeg_scale_is_the_smallest_sufficient_one(
    size: sizing.Size, target: sizing.Size | None, scale: int
) -> None:
    assert jpeg_scale(size, target) == scale


@given(SIDES, SIDES, SIDES, SIDES)
def test_reduced_jpeg_covers_its_target(width: int, height: int, w: int, h: int) -> None:
    target = (min(w, width), min(h, height))
    scale = jpeg_scale((width, height), target)
    assert -(-width // scale) >= target[0]
    assert -(-height // scale) >= target[1]


@given(SIDES, SIDES)
def test_native_resolution_equals_qwens_resize(width: int, height: int) -> None:
    rule = NativeResolution(28, 56 * 56, 1_003_520)
    if max(width, height) > 200 * min(width, height):
        assert rule.target(width, height) is None
        return
    wanted = smart_resize(height, width, 28, 56 * 56, 1_003_520)
    assert rule.target(width, height) == (wanted[1], wanted[0])


@pytest.mark.parametrize(
    ("rule", "size", "target"),
    [
        (FixedSize(384, 384), (4000, 3000), (384, 384)),
        (ShortestEdge(336), (4000, 3000), (448, 336)),
        (ShortestEdge(336), (3000, 4000), (336, 448)),
        (LongestEdge(1456), (4000, 3000), (1456, 1092)),
        (BestGrid(((336, 672), (672, 336), (672, 672))), (4000, 1000), (672, 168)),
        (BestGrid(((336, 672), (672, 336), (672, 672))), (1000, 1000), (672, 672)),
    ],
)
def test_decode_targets_are_as_in_the_table(
    rule: sizing.ResizeRule, size: sizing.Size, target: sizing.Size
) -> None:
    assert rule.target(*size) == target


def test_the_best_grid_equals_llava_nexts() -> None:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    rule = BestGrid(sizing.grids(pinpoints))
    for width in range(100, 3000, 171):
        for height in range(100, 3000, 133):
            assert rule.best(width, height) == select_best_resolution((height, width), pinpoints)


def test_a_picture_on_the_edge_between_grids_is_not_shrunk() -> None:
    rule = BestGrid(((336, 672), (672, 672)))
    tipping = [
        (width, 1000)
        for width in range(1000, 2400)
        if not sizing.covers(rule, (width, 1000), (-(-width // 2), 500))
    ]
    for size in tipping:
        assert rule.best(*size) != rule.best(-(-size[0] // 2), 500)
    assert sizing.covers(rule, (4000, 3000), (2000, 1500))
