"""A video track, as the readers of containers find it: its frames, and when each is shown.

Readers check every announced count against the bytes of the file before they use it.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from server.errors import InvalidVideo, VideoTooLarge
from server.imaging.sizing import Size

Container: TypeAlias = Literal["mp4", "matroska"]
Codec: TypeAlias = Literal["h264", "hevc", "vp8", "vp9", "av1", "mpeg4"]
Rotation: TypeAlias = Literal[0, 90, 180, 270]
Integers: TypeAlias = npt.NDArray[np.int64]

# Most frames of a video, and most samples of its track. The arrays of a track then take about
# 100 MiB while it is read.
MAX_FRAMES = 1 << 20
# Times beyond it, in the units of a file, are damage; sums of a few of them still fit into int64.
MAX_TICKS = 1 << 60

CODECS = "H.264, H.265, VP8, VP9, AV1, MPEG-4 part 2"


@dataclass(frozen=True, eq=False)
class Samples:
    """The encoded frames, in the order in which they are decoded.

    Attributes:
        offsets: int64 (samples,): where each one starts in the file, in bytes.
        sizes: int64 (samples,): in bytes. Each one lies in the file as a whole.
        keyframes: bool (samples,): decoding may start here.
    """

    offsets: Integers
    sizes: Integers
    keyframes: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What is shown.

    Attributes:
        frames: int64 (frames,): the number of the sample of each frame, in the order shown.
        times: float64 (frames,): when each frame is shown, in seconds after the first.
        duration_s: from the first frame to the end of the last one, in seconds.
    """

    frames: Integers
    times: npt.NDArray[np.float64]
    duration_s: float


@dataclass(frozen=True, eq=False)
class Track:
    """A video track.

    Attributes:
        coded_size: (width, height) of a decoded frame in pixels.
        rotation: clockwise, in degrees, from a decoded frame to one that is shown.
        configuration: the decoder's settings, as the container holds them.
        prefix: bytes that stand before those of each sample.
    """

    container: Container
    codec: Codec
    coded_size: Size
    rotation: Rotation
    samples: Samples
    timeline: Timeline
    configuration: bytes = b""
    prefix: bytes = b""


def damaged(what: str) -> InvalidVideo:
    """The error for a file that contradicts itself or its format."""
    return InvalidVideo(f"the video is damaged: {what}")


def check_count(count: int) -> None:
    """Raises VideoTooLarge if a file announces more than `MAX_FRAMES` frames."""
    if count > MAX_FRAMES:
        raise VideoTooLarge(f"the video has {count} frames, the limit is {MAX_FRAMES}")


def quarter_turns(degrees: float) -> Rotation:
    """The nearest rotation."""
    turns: tuple[Rotation, ...] = (0, 90, 180, 270)
    return turns[round(degrees / 90) % 4]
