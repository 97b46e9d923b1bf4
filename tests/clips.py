"""Videos and sounds for tests, and sandbox jobs that execute the command in their file."""

import functools
import importlib
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from server.errors import InvalidVideo
from server.ingest.video import VideoAnswer
from server.workers import spare_time
from server.workers.sandbox import Output
from server.workers.spare_time import SpareTime
from tests import intrusions

# A session description: FFmpeg takes it for a live stream, opens sockets and waits for packets.
SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"


@functools.cache
def video(
    suffix: str = ".mp4",
    codec: str = "mp4v",
    *,
    frames: int = 8,
    size: tuple[int, int] = (64, 48),
    fps: float = 4.0,
) -> bytes:
    """A video of noise, (width, height) in pixels, in the container format of `suffix`."""
    noise = np.random.default_rng(0)
    shape = (size[1], size[0], 3)
    pixels = [noise.integers(0, 256, shape, dtype=np.uint8) for _ in range(frames)]
    return of_frames(pixels, suffix, codec, fps)


def of_frames(
    frames: Sequence[npt.NDArray[np.uint8]],
    suffix: str = ".mp4",
    codec: str = "mp4v",
    fps: float = 1.0,
) -> bytes:
    """A video of uint8 frames (height, width, 3), BGR, in the container of `suffix`."""
    height, width, _ = frames[0].shape
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        writer = cv2.VideoWriter(
            file.name, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, (width, height)
        )
        assert writer.isOpened()
        for frame in frames:
            writer.write(frame)
        writer.release()
        return Path(file.name).read_bytes()


def referring(mp4: bytes, kind: bytes, location: bytes) -> bytes:
    """`mp4` with a data reference of `kind` that says its samples are in another file."""
    entry = struct.pack(">I4sI", 12 + len(location), kind, 0) + location
    return _with_references(mp4, (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"), entry)


def _with_references(box: bytes, path: tuple[bytes, ...], entry: bytes) -> bytes:
    """The boxes in `box`, with `entry` as the only child of the box at `path`."""
    if not path:
        return struct.pack(">II", 0, 1) + entry
    out, at = b"", 0
    while at < len(box):
        size, kind = struct.unpack_from(">I4s", box, at)
        contents = box[at + 8 : at + size]
        if kind == path[0]:
            contents = _with_references(contents, path[1:], entry)
        out += struct.pack(">I4s", 8 + len(contents), kind) + contents
        at += size
    return out


def sound(seconds: float = 0.1) -> bytes:
    """A WAV file of a tone at 8 kHz."""
    with BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(8000)
            tone = np.sin(np.arange(int(8000 * seconds)) / 5) * 20000
            writer.writeframes(tone.astype("<i2").tobytes())
        return file.getvalue()


# ---------------------------------------------------------------------- sandbox jobs


def prepare(job: bytes, spare: SpareTime) -> Callable[[bytes], Output]:
    """Execute the file's command: "echo", "hang", "spin", "die", "grow 100", "open PATH", ..."""

    def work(data: bytes) -> Output:
        command, _, argument = data[:200].decode().partition(" ")
        if command == "allowed":
            return Output(str(spare.allowed).encode())
        return _COMMANDS[command](job, argument)

    return work


def prepare_without_opencv(job: bytes, spare: SpareTime) -> Callable[[bytes], Output]:
    """As the server's, in a process that ends if OpenCV decodes a video."""
    work = engine_clips().prepare(job, spare)
    opencv: Any = cv2
    opencv.VideoCapture = lambda *_: os._exit(3)
    return work


def prepare_without_av(job: bytes, spare: SpareTime) -> Callable[[bytes], Output]:
    """As the server's, where the package av is not installed."""
    modules: dict[str, Any] = sys.modules
    modules["av"] = None
    return engine_clips().prepare(job, spare)


def prepare_frames(job: bytes, spare: SpareTime) -> Callable[[bytes], Output]:
    """Decode four frames, evenly spaced, each of which becomes fifteen times smaller."""
    frames = importlib.import_module("server.imaging.video.frames")
    header = importlib.import_module("server.imaging.video.header")

    def work(data: bytes) -> Output:
        found = header.read(data)
        indices = np.linspace(0, found.frame_count - 1, 4).astype(int).tolist()
        size = (found.size[0] // 15, found.size[1] // 15)
        decoded = frames.decode(data, indices, size, resize=lambda frame: frame[::15, ::15])
        return Output(msgspec.msgpack.encode(found.duration_s), [decoded])

    return work


def engine_clips() -> Any:
    """The module of the server, which imports vLLM."""
    return importlib.import_module("server.engine.clips")


def _echo(job: bytes, argument: str) -> Output:
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    return Output(job, [numbers, np.full((1,), 0.5, np.float32), np.empty((0, 4), np.uint8)])


def _hang(job: bytes, argument: str) -> Output:
    Path(argument).touch() if argument else None
    time.sleep(600)
    return Output(job)


def _rest(job: bytes, argument: str) -> Output:
    """A video of one picture, after some seconds without work."""
    time.sleep(5)
    answer = msgspec.msgpack.encode(VideoAnswer({}))
    return Output(answer, [np.zeros((1, 2, 2, 3), np.uint8)])


def _spin(job: bytes, argument: str) -> Output:
    while True:
        pass


def _spare(job: bytes, argument: str) -> Output:
    """Hang in a step that is run in spare time."""
    spare_time._MIN_SHARE = 0  # the machine may be busy
    spare = SpareTime(allowed=True)
    while spare.run(threading.get_ident) == threading.get_ident():
        pass
    spare.run(time.sleep, 600)
    return Output(job)


def _die(job: bytes, argument: str) -> Output:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Output(job)


def _grow(job: bytes, argument: str) -> Output:
    try:
        return Output(job, [np.zeros(int(argument) << 20, np.uint8)])
    except MemoryError:
        raise InvalidVideo("too much memory") from None


def _open(job: bytes, argument: str) -> Output:
    opened = []
    for name, opening in (
        ("file", lambda: os.open("/etc/hostname", os.O_RDONLY)),
        ("socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        ("pipe", os.pipe),
    ):
        try:
            opening()
        except OSError:
            continue
        opened.append(name)
    return Output(",".join(opened).encode())


def _intrude(job: bytes, argument: str) -> Output:
    return Output(", ".join(intrusions.not_prevented(int(argument))).encode())


_COMMANDS: dict[str, Callable[[bytes, str], Output]] = {
    "echo": _echo,
    "hang": _hang,
    "rest": _rest,
    "spin": _spin,
    "spare": _spare,
    "die": _die,
    "grow": _grow,
    "open": _open,
    "intrude": _intrude,
}
