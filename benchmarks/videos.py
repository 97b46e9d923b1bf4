"""Videos for the workloads: a photo that the camera moves over, in H.264."""

import io
import struct
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from benchmarks import photos

SECONDS, RATE = 30, 30
SIZE = (1920, 1080)


def clip(seed: int) -> bytes:
    """An MP4 of 1920x1080 pixels, 30 s long, 30 frames in a second, with a keyframe at least each
    250 frames, as x264 makes by default."""
    width, height = SIZE
    pixels = np.asarray(
        Image.open(io.BytesIO(photos.photo(2 * width, height, seed, 90, "JPEG"))).convert("RGB")
    )
    with (
        tempfile.NamedTemporaryFile(suffix=".mp4") as file,
        av.open(file.name, "w", format="mp4") as output,
    ):
        stream: Any = output.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(SECONDS * RATE):
            left = 2 * (index % (width // 2))
            frame = np.ascontiguousarray(pixels[:, left : left + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
        output.close()
        return Path(file.name).read_bytes()


def stamp(video: bytes, mark: str) -> bytes:
    """The same video as another file, with `mark` in an unused box at its end."""
    return video + struct.pack(">I4s", 8 + len(mark), b"free") + mark.encode("ascii")
