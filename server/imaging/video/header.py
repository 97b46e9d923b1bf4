"""What the header of a video file says, before anything is decoded."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from server.imaging.containers import video_container
from server.imaging.sizing import Size
from server.imaging.video import matroska, mp4
from server.imaging.video.track import Codec, Container, Rotation, Track

__all__ = ["Codec", "Container", "Form", "Rotation", "VideoHeader", "read", "read_track"]

Form: TypeAlias = Container | Literal["animation", "pictures"]
"""A container; an animated GIF or WebP picture; or pictures, as `pictures.pack` joins them."""

# Durations in files are whole numbers of ticks; a second has at most about so many.
_MOST_TICKS = 1 << 20


@dataclass(frozen=True, eq=False)
class VideoHeader:
    """The first video track of a file, an animation, or a series of pictures.

    Attributes:
        form: ISO-BMFF ("mp4", also MOV), Matroska (also WebM), or what else it is.
        codec: how its frames are encoded; None: as pictures.
        coded_size: (width, height) of a decoded frame in pixels.
        rotation: clockwise, in degrees, from a decoded frame to one that is shown.
        times: float64 (frames,): when each frame is shown, ascending, in seconds; the first is
            shown at 0. Edit lists are applied: frames outside of them are not counted.
        duration_s: from the first frame to the end of the last one, in seconds.
    """

    form: Form
    codec: Codec | None
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
        """Mean frames per second, as a quotient of whole numbers; 0 without a duration. Rules that
        choose frames round down what they make of it."""
        duration = Fraction(self.duration_s).limit_denominator(_MOST_TICKS)
        return float(self.frame_count / duration) if duration > 0 else 0.0


def read(data: bytes) -> VideoHeader:
    """The header of a video file. The work and the memory are bounded, whatever the file says.

    Raises:
        UnsupportedVideoFormat: the container or the codec is not supported.
        InvalidVideo: the file is damaged, has no frames, or refers to other files.
        VideoTooLarge: it has more than `track.MAX_FRAMES` frames.
    """
    track = read_track(data)
    return VideoHeader(
        form=track.container,
        codec=track.codec,
        coded_size=track.coded_size,
        rotation=track.rotation,
        times=track.timeline.times,
        duration_s=track.timeline.duration_s,
    )


def read_track(data: bytes) -> Track:
    """The whole track, with the places of all samples.

    Raises: as `read` does.
    """
    if video_container(data) == "mp4":
        return mp4.read(data)
    return matroska.read(data)
