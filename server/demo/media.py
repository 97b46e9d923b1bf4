"""Pictures and clips as files, and as parts of a chat message."""

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

# Qwen3-VL samples two frames per second but at least four in all: up to this rate it sees every
# frame.
CLIP_FPS = 1.0


def png(image: Image.Image, *, fast: bool = False) -> bytes:
    """A picture as a PNG file; `fast` compresses it less."""
    with io.BytesIO() as file:
        image.save(file, "PNG", compress_level=1 if fast else 6)
        return file.getvalue()


def mp4(frames: list[Image.Image]) -> bytes:
    """A video (VP9, at the quality of OpenCV's defaults) of RGB frames of one size."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # OpenCV only writes to named files
        codec = cv2.VideoWriter.fourcc(*"vp09")
        writer = cv2.VideoWriter(file.name, cv2.CAP_FFMPEG, codec, CLIP_FPS, frames[0].size)
        for frame in frames:
            writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))
        writer.release()
        return Path(file.name).read_bytes()


def image_part(data: bytes) -> dict[str, Any]:
    """A PNG file as a part of a message's content."""
    return {"type": "image_url", "image_url": {"url": _data_url("image/png", data)}}


def video_part(data: bytes) -> dict[str, Any]:
    """An MP4 file as a part of a message's content."""
    return {"type": "video_url", "video_url": {"url": _data_url("video/mp4", data)}}


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
