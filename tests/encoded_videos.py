"""Videos for tests, encoded with FFmpeg, and what FFmpeg reads from them."""

import contextlib
import functools
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt

from server.imaging.video.header import read_track

Frames = npt.NDArray[np.uint8]

ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
    "mpeg4": "mpeg4",
}
# One thread, so that equal frames give equal files.
X265_ALONE = "log-level=none:pools=none:frame-threads=1"
_QUIET = {"libx265": {"x265-params": X265_ALONE}, "libvpx": {"deadline": "realtime"}}
_TICKS = Fraction(1, 90_000)


def scene(count: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> Frames:
    """Frames that differ from each other: a bright square that moves over smooth colours; uint8
    (count, height, width, 3), RGB."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        phase = index * 0.37 + seed
        for channel in range(3):
            wave = np.sin(x / (9 + channel) + phase) + np.cos(y / (7 + channel) - phase)
            frames[index, :, :, channel] = 128 + 60 * wave
        left, top = (index * 7 + seed) % max(1, width - 12), (index * 5) % max(1, height - 12)
        frames[index, top : top + 12, left : left + 12] = 255 - index * 8 % 128
    return frames


@contextlib.contextmanager
def same_scheduling() -> Iterator[None]:
    """SVT-AV1 makes its caller a real-time thread if it may; nothing else would run then."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def encode(
    frames: Frames,
    codec: str = "h264",
    container: str = "mp4",
    *,
    times: Sequence[float] | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    rotation: int = 0,
    colors: Callable[[Any], None] | None = None,
) -> bytes:
    """A video of `frames`, shown at `times` in seconds, by default 25 in a second.

    `options` are the encoder's, `muxing` the container's, `rotation` is clockwise in degrees;
    `colors` sets fields of the encoder's context.
    """
    encoder = ENCODERS[codec]
    shown = times if times is not None else [index / 25 for index in range(len(frames))]
    with (
        same_scheduling(),
        tempfile.NamedTemporaryFile() as file,  # some options of containers open it a second time
        av.open(file.name, "w", format=container, container_options=muxing or {}) as output,
    ):
        stream: Any = output.add_stream(
            encoder, rate=25, options={**_QUIET.get(encoder, {}), **(options or {})}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = (
            _TICKS if codec != "mpeg4" else Fraction(1, 1000)
        )
        if rotation:
            stream.set_display_rotation(-rotation)
        if colors is not None:
            colors(stream.codec_context)
        for pixel, time in zip(frames, shown, strict=True):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        output.close()
        return Path(file.name).read_bytes()


@functools.cache
def video(
    codec: str = "h264",
    container: str = "mp4",
    count: int = 12,
    size: tuple[int, int] = (64, 48),
) -> bytes:
    """A small video of a `scene`."""
    return encode(scene(count, size), codec, container)


class Seen(NamedTuple):
    """What FFmpeg finds in a file: the size and the rotation of its frames, when each is shown, in
    seconds after the first, and its pixels."""

    codec: str
    size: tuple[int, int]
    rotation: int
    times: npt.NDArray[np.float64]
    frames: list[Frames]
    duration_s: float


def seen(data: bytes) -> Seen:
    """What FFmpeg reads and decodes from `data`."""
    with av.open(BytesIO(data)) as file:
        stream = file.streams.video[0]
        name, size = stream.codec_context.name, (stream.width, stream.height)
        frames = list(file.decode(stream))
        ticks = np.array([frame.pts for frame in frames], np.float64) * float(stream.time_base)
        rotation = -frames[0].rotation % 360
        pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
        end = float(stream.duration * stream.time_base) if stream.duration else 0.0
    return Seen(name, size, rotation, ticks - ticks[0], pixels, end)


def stripped(data: bytes, codec_id: bytes) -> bytes:
    """A Matroska file of the samples of the video `data`, whose first byte, equal in all of them,
    stands in the header only; 25 frames in a second, in the order decoded."""
    track = read_track(data)
    width, height = track.coded_size
    places = zip(track.samples.offsets.tolist(), track.samples.sizes.tolist(), strict=True)
    samples = [data[start : start + size] for start, size in places]
    (first,) = {sample[:1] for sample in samples}
    encoding = _element(0x5034, _element(0x4254, b"\3") + _element(0x4255, first))
    entry = _element(0xD7, b"\1") + _element(0x83, b"\1") + _element(0x86, codec_id)
    entry += _element(0x63A2, track.configuration) + _element(0x6D80, _element(0x6240, encoding))
    size = struct.pack(">H", width), struct.pack(">H", height)
    entry += _element(0xE0, _element(0xB0, size[0]) + _element(0xBA, size[1]))
    cluster = _element(0xE7, b"\0")
    for index, sample in enumerate(samples):
        head = b"\x81" + struct.pack(">hB", index * 40, 0x80 * track.samples.keyframes[index])
        cluster += _element(0xA3, head + sample[1:])
    segment = _element(0x1654AE6B, _element(0xAE, entry)) + _element(0x1F43B675, cluster)
    return _element(0x1A45DFA3, _element(0x4282, b"matroska")) + _element(0x18538067, segment)


def _element(kind: int, contents: bytes) -> bytes:
    """An EBML element."""
    name = kind.to_bytes((kind.bit_length() + 7) // 8)
    return name + b"\x01" + len(contents).to_bytes(7) + contents


def with_box(mp4: bytes, path: Sequence[bytes], contents: bytes) -> bytes:
    """`mp4` whose box at `path` has other contents, or which gets one if there is none."""
    out, at, found = b"", 0, False
    while at < len(mp4):
        size, kind = struct.unpack_from(">I4s", mp4, at)
        size = size or len(mp4) - at
        inner = mp4[at + 8 : at + size]
        if kind == path[0]:
            found = True
            inner = with_box(inner, path[1:], contents) if len(path) > 1 else contents
        out += struct.pack(">I4s", 8 + len(inner), kind) + inner
        at += size
    if not found:
        inner = with_box(b"", path[1:], contents) if len(path) > 1 else contents
        out += struct.pack(">I4s", 8 + len(inner), path[0]) + inner
    return out


def with_edits(mp4: bytes, *edits: tuple[int, int]) -> bytes:
    """`mp4`, whose moov box is at its end, with an edit list of (duration, media time)."""
    entries = b"".join(struct.pack(">Iii", duration, start, 1 << 16) for duration, start in edits)
    contents = struct.pack(">II", 0, len(edits)) + entries
    return with_box(mp4, (b"moov", b"trak", b"edts", b"elst"), contents)
