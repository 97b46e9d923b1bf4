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
# Options of x264. `usual` is its own default, with B frames and a keyframe at least each 250
# frames. `phone` is like what the encoders of phones make: no B frames, and a keyframe each second.
KINDS: dict[str, dict[str, str]] = {
    "usual": {},
    "phone": {"preset": "veryfast", "g": str(RATE), "bf": "0"},
}
# Encoding one takes half a minute, so they are kept for later runs.
_FOLDER = Path(tempfile.gettempdir()) / "saccade-benchmark-videos"


def clip(seed: int, kind: str = "usual") -> bytes:
    """An MP4 of 1920x1080 pixels, 30 s long, 30 frames in a second; `kind` is one of `KINDS`."""
    _FOLDER.mkdir(exist_ok=True)
    path = _FOLDER / f"{kind}-{seed}-{av.__version__}.mp4"
    if not path.exists():
        made = path.with_suffix(".part")
        _encode(made, seed, KINDS[kind])
        made.rename(path)
    return path.read_bytes()


def _encode(path: Path, seed: int, options: dict[str, str]) -> None:
    width, height = SIZE
    pixels = np.asarray(
        Image.open(io.BytesIO(photos.photo(2 * width, height, seed, 90, "JPEG"))).convert("RGB")
    )
    with av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(SECONDS * RATE):
            left = 2 * (index % (width // 2))
            frame = np.ascontiguousarray(pixels[:, left : left + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def stamp(video: bytes, mark: str) -> bytes:
    """The same video as another file, with `mark` in an unused box at its end."""
    return video + struct.pack(">I4s", 8 + len(mark), b"free") + mark.encode("ascii")
