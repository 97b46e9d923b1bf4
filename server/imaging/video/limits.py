"""How much of a video is decoded at all, by its header."""

from dataclasses import dataclass

from server.errors import VideoTooLarge
from server.imaging.video.header import VideoHeader


@dataclass(frozen=True)
class VideoLimits:
    """`max_pixels` of a frame, `max_seconds` of the whole video, and its `max_frames`."""

    max_pixels: int
    max_seconds: float
    max_frames: int

    def check(self, header: VideoHeader) -> None:
        """Raises VideoTooLarge."""
        width, height = header.size
        if width * height > self.max_pixels:
            raise VideoTooLarge(
                f"the video has {width}x{height} = {width * height} pixels per frame, "
                f"the limit is {self.max_pixels} pixels"
            )
        if header.duration_s > self.max_seconds:
            raise VideoTooLarge(
                f"the video takes {header.duration_s:.1f} s, the limit is {self.max_seconds:g} s"
            )
        if header.frame_count > self.max_frames:
            raise VideoTooLarge(
                f"the video has {header.frame_count} frames, the limit is {self.max_frames}"
            )
