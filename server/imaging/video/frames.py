"""Decodes chosen frames of a video. Only child processes import this module.

The samples are found by this project's readers of containers; the library gets them one by one, for
a decoder that is named to it. Its own readers and protocols are not used.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorTrc, Interpolation, VideoReformatter

from server.errors import InvalidVideo
from server.imaging.sizing import Size
from server.imaging.video import hdr, references
from server.imaging.video.header import read_track
from server.imaging.video.track import Codec, Rotation, Track

_DECODERS: dict[Codec, str] = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "vp9": "vp9",
    "av1": "libdav1d",
    "mpeg4": "mpeg4",
}
Resize: TypeAlias = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]
"""From one frame, uint8 (height, width, 3), to the same of another size. The order of the colours
must not matter."""

Run: TypeAlias = Callable[..., Any]
"""Calls a function, its first argument, with the others. Steps of some milliseconds get there."""

# What a decoder may need at once, in frames, and in bytes per pixel.
_SPARE_FRAMES, _MOST_FRAME_BYTES = 4, 3
# Bytes that FFmpeg may read beyond the end of its input.
_PADDING = 64
_HDR: dict[int, hdr.Transfer] = {ColorTrc.SMPTE2084: "pq", ColorTrc.ARIB_STD_B67: "hlg"}
# What OpenCV uses; frames that keep their size are converted as it does.
_AT_FULL_SIZE = Interpolation.BICUBIC
_SHRINKING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def decode(
    data: bytes,
    indices: Sequence[int],
    size: Size | None = None,
    max_pixels: int = 1 << 26,
    resize: Resize | None = None,
    run: Run = lambda step, *args: step(*args),
) -> npt.NDArray[np.uint8]:
    """The frames `indices` of a video, counted from 0 in the order shown, each at `size`. At any
    time, one of them is held at its full size.

    Args:
        size: (width, height) in pixels, after rotation; None: as in the header.
        max_pixels: most pixels of a decoded frame, whatever the header says.
        resize: makes `size` of a frame of the header's size; None: the library does.
        run: runs each step, such as the decoding of a sample.

    Returns:
        uint8 (indices, height, width, 3), RGB, upright. A frame that is damaged is replaced with
        the nearest one of `indices` that is not.

    Raises:
        InvalidVideo: none of the frames can be decoded.
        MemoryError
        IndexError: the video has no frame of such a number.
        UnsupportedVideoFormat, VideoTooLarge: as `header.read` does.
    """
    track = read_track(data)
    wanted = track.timeline.frames[np.asarray(indices, np.int64)]
    width, height = size or _turned(track.coded_size, track.rotation)
    result = np.empty((len(wanted), height, width, 3), np.uint8)
    found = np.zeros(len(wanted), np.bool_)
    own = track.coded_size if resize else _turned((width, height), track.rotation)
    convert = _Converter(own)
    for sample, frame in _frames(data, track, set(wanted.tolist()), max_pixels, run):
        picture = np.rot90(run(convert, frame), -track.rotation // 90)
        if resize is not None:
            picture = run(resize, np.ascontiguousarray(picture))
        for place in np.flatnonzero(wanted == sample):
            result[place], found[place] = picture[:, :, ::-1], True
    if not found.any():
        raise InvalidVideo("none of the chosen frames of the video can be decoded")
    decoded = np.flatnonzero(found)
    for missing in np.flatnonzero(~found):
        result[missing] = result[decoded[np.abs(decoded - missing).argmin()]]
    return result


def _turned(size: Size, rotation: Rotation) -> Size:
    """`size` as it is after a rotation, or before."""
    return size if rotation in (0, 180) else size[::-1]


def _frames(
    data: bytes, track: Track, wanted: set[int], max_pixels: int, run: Run
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of those samples, each with the number of its sample.

    The fewer frames a decoder holds back, the fewer buffers it fills in turn, which its processor's
    cache holds then. Where the file is wrong about the order, frames are missing and are decoded
    again.
    """
    missing = set(wanted)
    for reordered in sorted({references.reordered(track), references.MOST_REORDERED}):
        context = _decoder(track, max_pixels, reordered)
        for sample, frame in _decoded(context, data, track, frozenset(missing), run):
            missing.discard(sample)
            yield sample, frame
        if missing:
            _check_memory(track)
        if not missing or track.codec != "h264":
            return


def _decoded(
    context: av.VideoCodecContext, data: bytes, track: Track, wanted: frozenset[int], run: Run
) -> Iterator[tuple[int, av.VideoFrame]]:
    for first, last in references.spans(data, track, wanted):
        for sample, whole in references.needed(data, track, first, last, wanted):
            if track.codec != "av1":  # dav1d takes this only once
                context.skip_frame = "DEFAULT" if whole else "NONREF"
            yield from run(_chosen, context, _packet(data, track, sample), wanted)
        yield from run(_chosen, context, None, wanted)
        context.flush_buffers()


def _check_memory(track: Track) -> None:
    """Raises MemoryError if there is no room for some frames more: a decoder that got none may say
    that its input is damaged, or nothing."""
    width, height = track.coded_size
    np.empty(_SPARE_FRAMES * _MOST_FRAME_BYTES * width * height, np.uint8)


def _decoder(track: Track, max_pixels: int, reordered: int) -> av.VideoCodecContext:
    context: Any = av.CodecContext.create(_DECODERS[track.codec], "r")
    context.thread_count = 1
    context.options = {"max_pixels": str(max_pixels)}
    if track.codec == "h264":
        context.options |= {"has_b_frames": str(reordered)}
    configuration = track.configuration
    if track.codec == "mpeg4":
        # It reads text up to its end, and PyAV does not clear the memory behind these bytes.
        configuration += bytes(_PADDING)
    context.extradata = configuration or None
    return context  # type: ignore[no-any-return]


def _packet(data: bytes, track: Track, sample: int) -> "av.Packet[Any]":
    """The bytes of a sample; its number stands in for its time, so that frames bear it."""
    start, size = int(track.samples.offsets[sample]), int(track.samples.sizes[sample])
    # Not av.Packet(bytes): decoders read some bytes beyond the end, which must be zeros of its own.
    packet: av.Packet[Any] = av.Packet(len(track.prefix) + size)
    packet.update(track.prefix + data[start : start + size])
    packet.pts = packet.dts = sample
    packet.is_keyframe = bool(track.samples.keyframes[sample])
    return packet


def _chosen(
    context: av.VideoCodecContext, packet: "av.Packet[Any] | None", wanted: frozenset[int]
) -> list[tuple[int, av.VideoFrame]]:
    try:
        frames = context.decode(packet)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        return []  # a damaged frame; later ones may be whole
    return [(frame.pts, frame) for frame in frames if frame.pts in wanted]


class _Converter:
    """Turns decoded frames into arrays of BGR at (width, height)."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        """uint8 (height, width, 3). HDR is reduced to the range of sRGB."""
        transfer = _HDR.get(frame.color_trc)
        if transfer is not None:
            return hdr.to_srgb(self._converted(frame, "rgb48le"), transfer)[:, :, ::-1]
        # As OpenCV: the rounding of another order of colours differs.
        return self._converted(frame, "bgr24")

    def _converted(self, frame: av.VideoFrame, pixels: str) -> npt.NDArray[Any]:
        width, height = self._size
        flags = _AT_FULL_SIZE if (frame.width, frame.height) == self._size else _SHRINKING
        convert = self._reformatter.reformat
        return convert(frame, width, height, pixels, interpolation=flags, threads=1).to_ndarray()
