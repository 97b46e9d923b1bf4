"""Loops over pixels, compiled by numba, for which no available library is as fast.

Importing this module compiles them, in two seconds, or loads the code that an earlier process has
cached beside this file. Indices are checked, at a cost of an eighth of the time at most, and raise
IndexError outside of their array. In `unfilter`, checks would cost up to eight times the time, so
it checks the sizes of its arrays first, and its indices depend only on those.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from server.imaging.codecs.base import Pixels

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(signature: str, checked: bool = True) -> Callable[[_F], _F]:
    def compile_(function: _F) -> _F:
        options = {"nogil": True, "boundscheck": checked}
        try:
            done: _F = njit(signature, cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder for the code is writable, or its disk is full
            done = njit(signature, **options)(function)
        return done

    return compile_


@njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest(a: Any, b: Any, c: Any) -> Any:
    """The one of a, b and c that is nearest to a + b - c, without branches."""
    limit = 3 * c - a - b
    low, high = min(a, b), max(a, b)
    best = low if high <= limit else c
    return high if limit <= low else best


@njit(boundscheck=False)  # type: ignore[untyped-decorator]
def _undo_paeth_of_rgb(src: Any, up: Any, dst: Any) -> None:
    """Most rows of most photos have this filter. Handling three bytes at a time in registers takes
    two thirds of the time of the general loop. The caller has checked that the rows are equally
    long."""
    a0 = a1 = a2 = c0 = c1 = c2 = np.int32(0)
    for x in range(dst.size // 3):  # with a step, numba would check for negative indices
        i = 3 * x
        b0, b1, b2 = np.int32(up[i]), np.int32(up[i + 1]), np.int32(up[i + 2])
        a0 = np.int32((src[i] + _nearest(a0, b0, c0)) & 255)
        a1 = np.int32((src[i + 1] + _nearest(a1, b1, c1)) & 255)
        a2 = np.int32((src[i + 2] + _nearest(a2, b2, c2)) & 255)
        dst[i], dst[i + 1], dst[i + 2] = a0, a1, a2
        c0, c1, c2 = b0, b1, b2


@_compiled("i8(u1[:,::1], u1[:,::1], i8)", checked=False)
def unfilter(raw: Pixels, out: Pixels, step: int) -> int:
    """Undo PNG's filters (the PNG specification, section 9).

    `raw` is (rows, 1 + row bytes), where each row follows the number of its filter; `out`, (rows,
    row bytes), receives the pixels; `step` is the number of bytes of a pixel. Returns the first row
    whose filter is unknown, or -1.

    Raises:
        IndexError: the shapes do not match, or a row is shorter than a pixel.
    """
    rows, n = out.shape
    if not (raw.shape[0] == rows and raw.shape[1] == n + 1 and 1 <= step <= n):
        raise IndexError
    nothing = np.zeros(n, np.uint8)
    for y in range(rows):
        kind = raw[y, 0]
        src = raw[y, 1:]
        dst = out[y]
        up = out[y - 1] if y else nothing
        if kind == 0:
            for i in range(n):
                dst[i] = src[i]
        elif kind == 1:
            for i in range(step):
                dst[i] = src[i]
            for i in range(step, n):
                dst[i] = src[i] + dst[i - step]
        elif kind == 2:
            for i in range(n):
                dst[i] = src[i] + up[i]
        elif kind == 3:
            for i in range(step):
                dst[i] = src[i] + (up[i] >> 1)
            for i in range(step, n):
                dst[i] = src[i] + ((np.int32(dst[i - step]) + np.int32(up[i])) >> 1)
        elif kind == 4 and step == 3:
            _undo_paeth_of_rgb(src, up, dst)
        elif kind == 4:
            for i in range(step):
                dst[i] = src[i] + up[i]
            for i in range(step, n):
                a, b, c = np.int32(dst[i - step]), np.int32(up[i]), np.int32(up[i - step])
                dst[i] = src[i] + _nearest(a, b, c)
        else:
            return y
    return -1


@_compiled("void(u1[::1], u1[:,::1], u1[:,::1])")
def look_up(indices: Pixels, colours: Pixels, out: Pixels) -> None:
    """Write the `colours`, (256, 3), of `indices`, (n,), to `out`, (n, 3)."""
    for i in range(indices.size):
        index = indices[i]
        out[i, 0] = colours[index, 0]
        out[i, 1] = colours[index, 1]
        out[i, 2] = colours[index, 2]


@_compiled("void(u1[:,::1], u1[::1], u1[:,::1])")
def flatten(rgba: Pixels, background: Pixels, out: Pixels) -> None:
    """Composite `rgba`, (n, 4), on `background`, (3,), into `out`, (n, 3), rounding like Pillow's
    paste."""
    for i in range(rgba.shape[0]):
        alpha = np.uint32(rgba[i, 3])
        for k in range(3):
            mixed = rgba[i, k] * alpha + background[k] * (np.uint32(255) - alpha) + np.uint32(128)
            out[i, k] = (mixed + (mixed >> 8)) >> 8


@_compiled("void(u1[:,::1], i4[:,::1], i4[:,::1], u1[::1])")
def shape(pixels: Pixels, light: Any, matrix: Any, encoded: Pixels) -> None:
    """Convert `pixels` (n, 3) in place from one RGB space to another.

    `light`, (3, 256), is the linear light of each channel and value, and `matrix`, (3, 3), converts
    it, both in units of 2**-14; `encoded`, (2**14 + 1,), has the new value for each light. A fourth
    channel is not changed.
    """
    for i in range(pixels.shape[0]):
        r = light[0, pixels[i, 0]]
        g = light[1, pixels[i, 1]]
        b = light[2, pixels[i, 2]]
        for k in range(3):
            mixed = (matrix[k, 0] * r + matrix[k, 1] * g + matrix[k, 2] * b + 8192) >> 14
            pixels[i, k] = encoded[min(max(mixed, 0), 16384)]
