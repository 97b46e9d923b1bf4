"""ICC profiles for the tests, built from their parameters (ICC.1:2001-04)."""

import struct
from collections.abc import Sequence

import numpy as np

# Columns are red, green and blue in XYZ under D65, from the chromaticities of each space.
_D65 = (0.3127, 0.3290)
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def to_xyz(primaries: Sequence[tuple[float, float]]) -> np.ndarray:
    """The matrix from linear RGB to XYZ under D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, _white(_D65))


def rgb(primaries: Sequence[tuple[float, float]], curve: bytes) -> bytes:
    """A profile of an RGB space with a white of D65."""
    scale = (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ _white(_D65))
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ to_xyz(primaries)
    tags = {b"wtpt": _xyz(_D50)}
    for name, column in zip((b"r", b"g", b"b"), adapted.T, strict=True):
        tags[name + b"XYZ"] = _xyz(column)
        tags[name + b"TRC"] = curve
    return _profile(b"RGB ", tags)


def grey(curve: bytes) -> bytes:
    return _profile(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": curve})


def gamma(exponent: float) -> bytes:
    return struct.pack(">4s4xIH2x", b"curv", 1, round(exponent * 256))


def parametric(form: int, *numbers: float) -> bytes:
    packed = (round(number * 65536) for number in numbers)
    return struct.pack(f">4s4xHxx{len(numbers)}i", b"para", form, *packed)


def srgb_curve() -> bytes:
    values = np.linspace(0, 1, 1024)
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    table = np.rint(light * 65535).astype(">u2").tobytes()
    return struct.pack(">4s4xI", b"curv", 1024) + table


def _white(xy: tuple[float, float]) -> np.ndarray:
    x, y = xy
    return np.array([x / y, 1, (1 - x - y) / y])


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(float(value) * 65536) for value in values))


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"made by a test"
    named = {b"desc": struct.pack(">4s4xI", b"desc", len(text) + 1) + text + bytes(79)} | tags
    table, body = struct.pack(">I", len(named)), b""
    start = 128 + 4 + 12 * len(named)
    for name, value in named.items():
        value += bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    header = struct.pack(
        ">I4sI4s4s4s12x4s28xI3i48x",
        start + len(body),
        bytes(4),
        0x02400000,
        b"mntr",
        space,
        b"XYZ ",
        b"acsp",
        1,
        *(round(value * 65536) for value in _D50),
    )
    return header[:128].ljust(128, b"\0") + table + body
