"""Grids in AVIF and HEIC: one picture of many tiles, as phones write large photos."""

import functools
import struct
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from tests.corpus.cases import (
    INVALID,
    SURVIVES,
    TOO_LARGE,
    Case,
    Corners,
    Expectation,
    Size,
    seen,
)
from tests.corpus.encoded import FORMATS, MIMES
from tests.corpus.scenes import CORNERS
from tests.corpus.writers import boxes
from tests.corpus.writers.grid import Grid, grid

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_TILE = 64
_PICTURE: Size = (2 * _TILE, 2 * _TILE)


def cases() -> Iterator[Case]:
    for kind in ("avif", "heic"):
        for name, make, expected in _grids(functools.partial(_made, kind)):
            yield Case(f"{kind}/grid-{name}", make, expected, MIMES[kind])


@functools.cache
def _tiles(kind: str) -> tuple[bytes, ...]:
    """A file of one colour for each quadrant."""
    images = (Image.new("RGB", (_TILE, _TILE), color) for color in CORNERS)
    return tuple(FORMATS[kind](image) for image in images)


def _made(
    kind: str,
    layout: Size = (2, 2),
    size: Size = _PICTURE,
    references: Sequence[int] = (1, 2, 3, 4),
    said: Size | None = None,
) -> bytes:
    """A grid of `layout` (columns, rows) over the items `references`: 1 to 4 are tiles, 5 is the
    grid. `said` is the size that its property declares instead of `size`."""
    return grid(_tiles(kind), Grid(layout, size, references, said or size))


def _grids(made: Callable[..., bytes]) -> Group:
    whole = functools.partial(functools.partial, made)
    yield "of-4", whole(), seen(CORNERS, _PICTURE, 30)
    yield "cropped", whole(size=(100, 90)), seen(CORNERS, (100, 90), 30)
    yield "turned", lambda: _turned(made()), seen(_turned_corners(), _PICTURE, 30)
    most = {"layout": (156, 156), "size": (9_984, 9_984)}
    yield "of-24336-tiles", whole(references=[1] * 156 * 156, **most), SURVIVES
    yield "of-missing-tiles", whole(references=[1]), INVALID
    yield "of-no-tiles", whole(references=[]), INVALID
    yield "of-itself", whole(references=[5, 5, 5, 5]), INVALID
    yield "of-unknown-tiles", whole(references=[9, 9, 9, 9]), INVALID
    yield "larger-than-its-tiles", whole(size=(300, 300)), INVALID
    yield "announces-20000x20000", whole(said=(20_000, 20_000)), TOO_LARGE
    yield "is-20000x20000", whole(size=(20_000, 20_000), said=_PICTURE), SURVIVES
    yield "of-256x256-tiles", whole(layout=(256, 256), size=(16_384, 16_384)), TOO_LARGE


def _turned(data: bytes) -> bytes:
    """Rotated by 90 degrees counterclockwise."""
    return boxes.with_property(data, boxes.box(b"irot", struct.pack("B", 1)), item=5)


def _turned_corners() -> Corners:
    top_left, top_right, bottom_left, bottom_right = CORNERS
    return top_right, bottom_right, top_left, bottom_left
