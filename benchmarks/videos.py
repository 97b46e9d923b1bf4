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
# Seconds of a large clip that differ from each other.
_GROUP_S = 2
# Encoding one takes half a minute, so they are kept for later runs.
_FOLDER = Path(tempfile.gettempdir()) / "saccade-benchmark-videos"


def clip(seed: int, kind: str = "usual") -> bytes:
    """An MP4 of 1920x1080 pixels, 30 s long, 30 frames in a second; `kind` is one of `KINDS`."""
    return _kept(f"{kind}-{seed}", KINDS[kind], SIZE, SECONDS, seed)


def large(quality: int, seconds: int) -> bytes:
    """An MP4 of 3840x2160 pixels, whose first two seconds are repeated. `quality` is x264's `crf`:
    more is less."""
    options = {"crf": str(quality), "preset": "veryfast"}
    group = _kept(f"4k-{quality}", options, (3840, 2160), _GROUP_S, 0)
    return repeated(group, seconds // _GROUP_S)


def _kept(
    name: str, options: dict[str, str], size: tuple[int, int], seconds: int, seed: int
) -> bytes:
    _FOLDER.mkdir(exist_ok=True)
    path = _FOLDER / f"{name}-{av.__version__}.mp4"
    if not path.exists():
        made = path.with_suffix(".part")
        _encode(made, options, size, seconds * RATE, seed)
        made.rename(path)
    return path.read_bytes()


def _encode(
    path: Path, options: dict[str, str], size: tuple[int, int], count: int, seed: int
) -> None:
    width, height = size
    pixels = np.asarray(
        Image.open(io.BytesIO(photos.photo(2 * width, height, seed, 90, "JPEG"))).convert("RGB")
    )
    with av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(count):
            left = 2 * (index % (width // 2))
            frame = np.ascontiguousarray(pixels[:, left : left + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def repeated(mp4: bytes, times: int) -> bytes:
    """An MP4 that shows `mp4`, which begins with a keyframe, `times` times in a row."""
    out = io.BytesIO()
    with av.open(io.BytesIO(mp4)) as source, av.open(out, "w", format="mp4") as output:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        step = sum(packet.duration or 0 for packet in packets)
        copy = output.add_stream_from_template(stream)
        for turn in range(times):
            for packet in packets:
                again: av.Packet[Any] = av.Packet(bytes(packet))
                again.stream, again.time_base = copy, packet.time_base
                again.pts = (packet.pts or 0) + turn * step
                again.dts = (packet.dts or 0) + turn * step
                again.duration, again.is_keyframe = packet.duration, packet.is_keyframe
                output.mux(again)
    return out.getvalue()


def stamp(video: bytes, mark: str) -> bytes:
    """The same video as another file, with `mark` in an unused box at its end."""
    return video + struct.pack(">I4s", 8 + len(mark), b"free") + mark.encode("ascii")
