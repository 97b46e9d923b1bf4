"""Compiled pixel loops: arrays of mismatched sizes raise an error instead of crashing."""

import numpy as np
import numpy.typing as npt
import pytest

from server.imaging.codecs import kernels

Pixels = npt.NDArray[np.uint8]
LIGHT, MATRIX = np.zeros((3, 256), np.int32), np.zeros((3, 3), np.int32)
ENCODED = np.zeros((1 << 14) + 1, np.uint8)


def _zeros(*shape: int) -> Pixels:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(
    ("raw", "out", "step"),
    [
        ((4, 10), (5, 9), 3),
        ((5, 9), (5, 9), 3),
        ((5, 3), (5, 2), 3),
        ((5, 10), (5, 9), 0),
        ((5, 10), (5, 9), -1),
    ],
)
def test_unfiltering_rows_of_the_wrong_size_is_an_error(
    kind: int, raw: tuple[int, int], out: tuple[int, int], step: int
) -> None:
    filtered = _zeros(*raw)
    filtered[:, 0] = kind
    with pytest.raises(IndexError):
        kernels.unfilter(filtered, _zeros(*out), step)


def test_a_palette_index_out_of_range_is_an_error() -> None:
    indices = np.arange(9, dtype=np.uint8)
    with pytest.raises(IndexError):
        kernels.look_up(indices, _zeros(8, 3), _zeros(9, 3))


def test_an_output_too_short_is_an_error() -> None:
    with pytest.raises(IndexError):
        kernels.look_up(_zeros(9), _zeros(256, 3), _zeros(8, 3))
    with pytest.raises(IndexError):
        kernels.flatten(_zeros(9, 4), _zeros(3), _zeros(8, 3))


def test_converting_a_picture_without_three_channels_to_rgb_is_an_error() -> None:
    with pytest.raises(IndexError):
        kernels.shape(_zeros(9, 2), LIGHT, MATRIX, ENCODED)


def test_curves_that_are_too_short_are_an_error() -> None:
    bright = np.full((3, 256), 1 << 14, np.int32)
    identity = np.eye(3, dtype=np.int32) << 14
    with pytest.raises(IndexError):
        kernels.shape(_zeros(9, 3), bright, identity, ENCODED[:-1])
    with pytest.raises(IndexError):
        kernels.shape(_zeros(9, 3) + 255, LIGHT[:, :255].copy(), MATRIX, ENCODED)
