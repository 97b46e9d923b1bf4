"""ICC profiles: converts the colours of a file to sRGB with LittleCMS (Pillow's ImageCms).

Most profiles make no visible difference; they are recognised once and then skipped. RGB profiles
with a matrix, such as the Display P3 of phones, are applied by a compiled loop that is checked
against LittleCMS and takes a quarter of its time.
"""

import functools
import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from server.imaging.codecs.base import Pixels

# The colour space that a profile must have for a picture of a mode.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
# Two spaces whose values differ by no more than this, of 255, count as the same.
_SAME = 2
_LATTICE_STEPS = 9
_KEPT_PROFILES = 16
# One in the fixed-point numbers of `kernels.shape`.
_ONE = 1 << 14
# Limits on reading a profile here.
_MAX_TAGS, _MAX_POINTS = 100, 4096
# Parameters of the curves of the type "para", by their form.
_PARAMETERS = {0: "g", 1: "gab", 2: "gabc", 3: "gabcd", 4: "gabcdef"}


@dataclass(frozen=True)
class Shaper:
    """A conversion between RGB spaces by curves and a matrix: the arguments of `kernels.shape`."""

    light: npt.NDArray[np.int32]
    matrix: npt.NDArray[np.int32]
    encoded: Pixels

    def applied(self, pixels: Pixels) -> Pixels:
        """Convert uint8 (height, width, 3 or 4), possibly in place. Alpha stays."""
        from server.imaging.codecs import kernels

        pixels = writable(pixels)
        rows = pixels.reshape(-1, pixels.shape[2])
        kernels.shape(rows, self.light, self.matrix, self.encoded)
        return pixels


@dataclass(frozen=True)
class Change:
    """The conversion from a profile's space to sRGB. `shaper`, if any, does the same faster."""

    transform: Any
    shaper: Shaper | None

    def applied(self, image: Image.Image) -> Image.Image:
        changed = ImageCms.applyTransform(image, self.transform)
        assert changed is not None
        return changed


def writable(pixels: Pixels) -> Pixels:
    """`pixels` as the compiled loops take them: contiguous and writable."""
    return np.require(pixels, requirements=("C", "W"))


def change_of(profile: bytes | None, mode: str) -> Change | None:
    """The change that `profile` asks for in a picture of Pillow's `mode`: RGB, L, CMYK or LAB.

    None if it makes no difference, belongs to another kind of picture, or is broken.
    """
    if mode == "LAB":
        return _lab()
    return _known_change(profile, mode) if profile is not None else None


@functools.lru_cache(_KEPT_PROFILES)
def _known_change(profile: bytes, mode: str) -> Change | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES.get(mode):
            return None
        transform = _transform(source, mode)
        if mode == "CMYK":
            return Change(transform, None)
        samples = _samples(mode)
        wanted = _array(ImageCms.applyTransform(samples, transform))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ArithmeticError, struct.error):
        return None
    if np.abs(wanted - _array(samples.convert("RGB"))).max() <= _SAME:
        return None
    return Change(transform, _shaper(profile, source, transform) if mode == "RGB" else None)


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        source,
        _srgb(),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _lab() -> Change:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return Change(_transform(lab, "LAB"), None)


def _samples(mode: str) -> Image.Image:
    """Colours from the whole space, as a picture one pixel high."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    steps = np.linspace(0, 255, _LATTICE_STEPS).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    return Image.fromarray(lattice)


def _array(image: Image.Image | None) -> npt.NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def _shaper(
    profile: bytes, source: ImageCms.ImageCmsProfile, transform: ImageCms.ImageCmsTransform
) -> Shaper | None:
    """The profile's curves and matrix; None unless they agree with LittleCMS."""
    primaries, ours = _primaries(source), _primaries(_srgb())
    curves = [_curve(profile, name) for name in (b"rTRC", b"gTRC", b"bTRC")]
    if primaries is None or ours is None or any(curve is None for curve in curves):
        return None
    light = np.rint(np.clip(np.array(curves), 0, 1) * _ONE).astype(np.int32)
    matrix = np.rint(np.linalg.solve(ours, primaries) * _ONE).astype(np.int32)
    encoded = np.rint(_encoded(np.arange(_ONE + 1) / _ONE) * 255).astype(np.uint8)
    shaper = Shaper(light, np.ascontiguousarray(matrix), encoded)
    samples = _samples("RGB")
    wanted = _array(ImageCms.applyTransform(samples, transform))
    got = shaper.applied(np.array(samples)).astype(np.int16)
    return shaper if np.abs(got - wanted).max() <= _SAME else None


def _primaries(profile: ImageCms.ImageCmsProfile) -> npt.NDArray[np.float64] | None:
    """The XYZ values of red, green and blue as columns: float64 (3, 3)."""
    core = profile.profile
    columns = (core.red_colorant, core.green_colorant, core.blue_colorant)
    if any(column is None for column in columns):
        return None
    return np.array([column[0] for column in columns if column is not None]).T


def _curve(profile: bytes, name: bytes) -> npt.NDArray[np.float64] | None:
    """The linear light, 0 to 1, of the 256 values of a channel (ICC.1:2022, 10.6 and 10.18); None
    if the curve is not supported."""
    at = _tag(profile, name)
    if at is None:
        return None
    values = np.linspace(0, 1, 256)
    kind, count = struct.unpack_from(">4s4xI", profile, at)
    if kind == b"para":
        return _parametric(values, count >> 16, profile[at + 12 :])
    if kind != b"curv" or count > _MAX_POINTS:
        return None
    points = struct.unpack_from(f">{count}H", profile, at + 12)
    if count > 1:
        return np.interp(values, np.linspace(0, 1, count), np.array(points) / 65535)
    return np.asarray(values ** (points[0] / 256) if points else values)


def _tag(profile: bytes, name: bytes) -> int | None:
    """The offset of a tag's data; None if the profile lacks the tag."""
    (count,) = struct.unpack_from(">I", profile, 128)
    for number in range(min(count, _MAX_TAGS)):
        tag, at = struct.unpack_from(">4sI", profile, 132 + 12 * number)
        if tag == name:
            return int(at)
    return None


def _parametric(
    values: npt.NDArray[np.float64], form: int, numbers: bytes
) -> npt.NDArray[np.float64] | None:
    """A curve of the type "para" (ICC.1:2022, 10.18); None if `form` is unknown."""
    if form not in _PARAMETERS:
        return None
    names = _PARAMETERS[form]
    given = struct.unpack_from(f">{len(names)}i", numbers)
    p = dict.fromkeys("bcdef", 0.0) | {"a": 1.0}
    p |= {name: number / 65536 for name, number in zip(names, given, strict=True)}
    knee = -p["b"] / p["a"] if form in (1, 2) else p["d"]
    curve = np.maximum(p["a"] * values + p["b"], 0) ** p["g"]
    if form == 2:  # in this form, c is added to both parts
        return np.where(values >= knee, curve + p["c"], p["c"])
    return np.where(values >= knee, curve + p["e"], p["c"] * values + p["f"])


def _encoded(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sRGB values, 0 to 1, of linear light (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
