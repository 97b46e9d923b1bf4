"""From HDR to the range and the primaries of sRGB.

ITU-R BT.2100 (PQ and HLG), BT.2408 (reference white), BT.2087 (primaries).
"""

import functools
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Transfer: TypeAlias = Literal["pq", "hlg"]
Floats: TypeAlias = npt.NDArray[np.float32]

# The luminance of white paper and captions, in cd/m2; it becomes white. HLG is shown on a display
# with this peak.
_WHITE, _HLG_PEAK, _HLG_GAMMA = 203.0, 1000.0, 1.2
# Light above this share of white is compressed into what is left.
_KNEE = 0.8
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_STEPS = 4095
# Rows that are converted at a time, so that the floats of a frame do not exist all at once.
_ROWS = 64


def to_srgb(frame: npt.NDArray[np.uint16], transfer: Transfer) -> npt.NDArray[np.uint8]:
    """A frame of BT.2020 primaries, uint16 (height, width, 3), as uint8 of sRGB, same shape."""
    result = np.empty(frame.shape, np.uint8)
    for top in range(0, len(frame), _ROWS):
        result[top : top + _ROWS] = _converted(frame[top : top + _ROWS], transfer)
    return result


def _converted(frame: npt.NDArray[np.uint16], transfer: Transfer) -> npt.NDArray[np.uint8]:
    light = _light(transfer)[frame]
    if transfer == "hlg":  # the gamma of a display applies to the luminance of a pixel
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (np.maximum(luminance, 1e-6) ** (_HLG_GAMMA - 1))[..., None] * (_HLG_PEAK / _WHITE)
    light = np.maximum(light @ _TO_BT709.T, 0)
    peak = np.maximum(light.max(axis=2), 1e-6)
    above = np.maximum(peak - _KNEE, 0)
    shown = np.minimum(peak, _KNEE) + (1 - _KNEE) * (1 - np.exp(-above / (1 - _KNEE)))
    light *= (shown / peak)[..., None]
    steps = np.rint(np.minimum(light, 1) * _STEPS).astype(np.uint16)
    frame_srgb: npt.NDArray[np.uint8] = _srgb()[steps]
    return frame_srgb


@functools.cache
def _light(transfer: Transfer) -> Floats:
    """The light of each of 65536 values: of white paper 1 for PQ; from 0 to 1 for HLG."""
    signal = np.arange(1 << 16) / ((1 << 16) - 1)
    if transfer == "pq":
        power = signal ** (1 / 78.84375)
        ratio = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        return np.asarray(10_000 / _WHITE * ratio ** (1 / 0.1593017578125), np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    low, high = signal**2 / 3, (np.exp((signal - c) / a) + b) / 12
    values: Floats = np.where(signal <= 0.5, low, high).astype(np.float32)
    return values


@functools.cache
def _srgb() -> npt.NDArray[np.uint8]:
    """The sRGB value of each of `_STEPS` + 1 steps of light."""
    light = np.arange(_STEPS + 1) / _STEPS
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    values: npt.NDArray[np.uint8] = np.rint(curved * 255).astype(np.uint8)
    return values
