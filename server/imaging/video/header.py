"""What the header of a video file says, before anything is decoded."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from server.imaging.sizing import Size

Container: TypeAlias = Literal["mp4", "matroska"]
Codec: TypeAlias = Literal["h264", "hevc", "vp8", "vp9", "av1", "mpeg4"]
Rotation: TypeAlias = Literal[0, 90, 180, 270]


@dataclass(frozen=True, eq=False)
class VideoHeader:
    """The first video track of a file.

    Attributes:
        container: ISO-BMFF (MP4, MOV) or Matroska (WebM).
        codec: how its frames are encoded.
        coded_size: (width, height) of a decoded frame in pixels.
        rotation: clockwise, in degrees, from a decoded frame to one that is shown.
        times: float64 (frames,): when each frame is shown, ascending, in seconds; the first is
            shown at 0. Edit lists are applied: frames outside of them are not counted.
        duration_s: from the first frame to the end of the last one, in seconds.
    """

    container: Container
    codec: Codec
    coded_size: Size
    rotation: Rotation
    times: npt.NDArray[np.float64]
    duration_s: float

    @property
    def size(self) -> Size:
        """(width, height) of a frame that is shown, in pixels."""
        width, height = self.coded_size
        return (height, width) if self.rotation in (90, 270) else (width, height)

    @property
    def frame_count(self) -> int:
        return len(self.times)

    @property
    def fps(self) -> float:
        """Mean frames per second; 0 without a duration."""
        return self.frame_count / self.duration_s if self.duration_s > 0 else 0.0
