"""Pictures for the tests, drawn and encoded on the fly."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Size = tuple[int, int]

_DEMO_MODEL = Path(__file__).parents[1] / "server" / "demo"
_PROCESSOR = json.loads((_DEMO_MODEL / "preprocessor_config.json").read_text())
TOKEN_PIXELS: int = _PROCESSOR["patch_size"] * _PROCESSOR["merge_size"]
"""Pixels of one token of the demo model, along each side of a picture."""

# Maps an upright array (height, width, channels) to its layout in a file, per EXIF orientation.
STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright.transpose(1, 0, 2), 2),
    8: lambda upright: np.rot90(upright, -1),
}


def shape(color: str, kind: str = "circle", size: Size = (224, 224)) -> Image.Image:
    """One shape ("circle" or "square") in the middle of a white picture."""
    image = Image.new("RGB", size, "white")
    width, height = size
    side = min(size) // 4
    box = (width // 2 - side, height // 2 - side, width // 2 + side, height // 2 + side)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if kind == "circle" else draw.rectangle)(box, fill=color)
    return image


def photo(size: Size, seed: int = 0) -> Image.Image:
    """A picture with a camera-like spectrum: amplitude decreases with frequency, random phase."""
    random = np.random.default_rng(seed)
    width, height = size
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * random.random(frequency.shape))
        plane = np.fft.irfft2(phase / frequency**1.2, s=(height, width))
        channels.append(128 + 45 * plane / plane.std())
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file of `image`: kind is Pillow's format name."""
    file = io.BytesIO()
    image.save(file, kind, **(_in_little_time(kind) | options))
    return file.getvalue()


def _in_little_time(kind: str) -> dict[str, Any]:
    """Options for encoders that would spend many times as long on a slightly smaller file."""
    if kind == "AVIF":
        return {"speed": 10}
    return {"enc_params": {"preset": "ultrafast"}} if kind == "HEIF" else {}


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def series_url(*files: bytes) -> str:
    """The URL of a video that is sent as these JPEG pictures."""
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(each).decode() for each in files)


def video_part(url: str, **options: Any) -> dict[str, Any]:
    """A chat part with the video at `url`."""
    return {"type": "video_url", "video_url": {"url": url, **options}}


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    """A chat part with the image file `data`."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}, **more}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one user message."""
    return [{"role": "user", "content": list(parts)}]
