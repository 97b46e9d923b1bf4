"""A video as it was sent, and what the model is to see of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.imaging.sampling import ChosenFrames, SamplingOptions
from server.imaging.video.header import VideoHeader


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video file, the hash of its bytes, and the frames of it that the model is to see.

    Attributes:
        data: the file.
        digest: BLAKE3 of the file, in hexadecimal.
        header: what its header says.
        chosen: the frames that the model's own rule takes, before any cap.
        options: the request's options for it.
        path: the place of its part in the request, for errors.
    """

    data: bytes = field(repr=False)
    digest: str
    header: VideoHeader
    chosen: ChosenFrames
    options: SamplingOptions = field(default_factory=SamplingOptions)
    path: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a frame that is shown, in pixels."""
        return self.header.size

    def times(self, indices: Sequence[int]) -> tuple[float, ...]:
        """When the frames `indices` are shown, in seconds, to a millisecond."""
        return tuple(round(float(self.header.times[index]), 3) for index in indices)
