"""Which samples of a track have to be decoded for the frames that are wanted.

ITU-T H.264, 7.4.1 (nal_ref_idc); ITU-T H.265, 7.4.2.2 (sub-layers). Nothing is decoded here: the
first bytes of the units in a sample say whether other frames may refer to it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.imaging.video.track import Track

# Most frames that a decoder of H.264 holds back until their order is known.
MOST_REORDERED = 16
# How far back frames are looked for that are shown later; some more than files have.
_WINDOW = 32
# Units of one sample that are looked at.
_MAX_UNITS = 64
# Types of units that belong to the picture alone. H.264: slices (but none of a key picture),
# delimiters and filling; H.265: slices, delimiters and filling.
_AVC_SLICES, _AVC_OTHERS = range(1, 5), (9, 12)
_AVC_SLICE = 1
# Types of slices without references, modulo 5.
_AVC_INTRA = (2, 4)
# Of a unit, for its type and the first two numbers of a slice.
_HEAD_BYTES = 8
_HEVC_SLICES, _HEVC_OTHERS = range(10), (35, 38)


@dataclass(frozen=True)
class _Picture:
    """What a sample says of itself. `layer`: pictures of lower layers do not refer to it.
    `is_reference`: others of its layer may. `is_alone`: it has nothing but one picture."""

    layer: int = 0
    is_reference: bool = True
    is_alone: bool = False


def spans(data: bytes, track: Track, wanted: Collection[int]) -> list[tuple[int, int]]:
    """Ranges of samples to decode, (first, last), each from a keyframe to a wanted sample."""
    keyframes = np.flatnonzero(track.samples.keyframes)
    if track.codec == "h264":
        keyframes = keyframes[[not _refreshes(data, track, int(each)) for each in keyframes]]
    shown = _shown(track)
    found: list[tuple[int, int]] = []
    for sample in sorted(wanted):
        index = int(np.searchsorted(keyframes, sample, "right")) - 1
        # A frame that is decoded after a keyframe but shown before it may need earlier ones.
        while index > 0 and shown[keyframes[index]] > shown[sample]:
            index -= 1
        first = int(keyframes[index]) if index >= 0 else 0
        while found and first <= found[-1][1]:
            first = min(first, found.pop()[0])
        found.append((first, sample))
    return found


def _refreshes(data: bytes, track: Track, sample: int) -> bool:
    """Whether a keyframe of H.264 is none, but the frame from which on the picture is refreshed
    piece by piece: its slices refer to earlier frames."""
    heads = _heads(data, track, sample, 4)
    kinds = [_slice_type(head[1:]) for head in heads if head[0] & 31 == _AVC_SLICE]
    return any(kind is not None and kind % 5 not in _AVC_INTRA for kind in kinds)


def _slice_type(head: bytes) -> int | None:
    """The second number of a slice's header; None if it takes more than `head`."""
    bits = "".join(f"{byte:08b}" for byte in head)
    at, number = 0, None
    for _ in range(2):
        zeros = bits.find("1", at) - at
        end = at + 2 * zeros + 1
        if zeros < 0 or end > len(bits):
            return None
        number, at = int(bits[at + zeros : end], 2) - 1, end
    return number


def reordered(track: Track) -> int:
    """Most frames that are decoded before another one and shown after it, as far as the file says;
    `MOST_REORDERED` where it does not."""
    shown = _shown(track)
    if (shown < 0).any():
        return MOST_REORDERED
    later = np.zeros(len(shown), np.int64)
    for back in range(1, min(_WINDOW, len(shown))):
        later[back:] += shown[:-back] > shown[back:]
    return min(int(later.max()), MOST_REORDERED)


def needed(
    data: bytes, track: Track, first: int, last: int, wanted: Collection[int]
) -> Iterator[tuple[int, bool]]:
    """The samples from `first` to `last` that a decoder has to get, in order, and whether it has to
    decode them, or else may leave out what no other frame refers to."""
    if track.codec == "hevc":
        return _of_hevc(data, track, first, last, wanted)
    return _of_others(data, track, first, last, wanted)


def _shown(track: Track) -> npt.NDArray[np.int64]:
    """When each sample is shown, as the number of its frame; -1: it is not."""
    shown = np.full(len(track.samples), -1, np.int64)
    shown[track.timeline.frames[::-1]] = np.arange(len(track.timeline.frames))[::-1]
    return shown


def _of_others(
    data: bytes, track: Track, first: int, last: int, wanted: Collection[int]
) -> Iterator[tuple[int, bool]]:
    for sample in range(first, last + 1):
        if sample in wanted:
            yield sample, True
        elif track.codec != "h264" or not _is_unused(data, track, sample):
            yield sample, False


def _is_unused(data: bytes, track: Track, sample: int) -> bool:
    """Whether a sample of H.264 has a picture that no other one refers to, and nothing else."""
    heads = _heads(data, track, sample, 4)
    is_unused = False
    for head in heads:
        kind = head[0] & 31
        if kind in _AVC_SLICES and not head[0] & 0x60:
            is_unused = True
        elif kind not in _AVC_OTHERS:
            return False
    return is_unused


def _of_hevc(
    data: bytes, track: Track, first: int, last: int, wanted: Collection[int]
) -> Iterator[tuple[int, bool]]:
    pictures = [_hevc_picture(data, track, sample) for sample in range(first, last + 1)]
    # The highest layer of the wanted frames from each sample on: what is needed is not above it.
    highest = [-1] * len(pictures)
    top = -1
    for index in reversed(range(len(pictures))):
        if first + index in wanted:
            top = max(top, pictures[index].layer)
        highest[index] = top
    for index, picture in enumerate(pictures):
        at_most = picture.layer + (not picture.is_reference)
        if first + index in wanted or at_most <= highest[index]:
            yield first + index, True
        elif not picture.is_alone:
            yield first + index, False


def _hevc_picture(data: bytes, track: Track, sample: int) -> _Picture:
    heads = _heads(data, track, sample, 21)
    slices = [head for head in heads if head[0] >> 1 & 63 in _HEVC_SLICES]
    if not slices:
        return _Picture()
    others = [head for head in heads if head[0] >> 1 & 63 not in _HEVC_OTHERS]
    layer = min(max(0, (head[1] & 7) - 1) for head in slices)
    is_reference = any(head[0] >> 1 & 1 for head in slices)
    of_base = all(not head[0] & 1 and not head[1] >> 3 for head in slices)
    return _Picture(layer, is_reference, is_alone=of_base and len(others) == len(slices))


def _heads(data: bytes, track: Track, sample: int, width_at: int) -> Sequence[bytes]:
    """The first bytes of the units in a sample; none if it is not made of them, or of too many. The
    configuration says at `width_at` how lengths are written."""
    if len(track.configuration) <= width_at or track.prefix:
        return ()
    width, least = (track.configuration[width_at] & 3) + 1, 1 if track.codec == "h264" else 2
    at = int(track.samples.offsets[sample])
    end = at + int(track.samples.sizes[sample])
    found: list[bytes] = []
    while at < end and len(found) < _MAX_UNITS:
        size = int.from_bytes(data[at : at + width])
        at += width
        if size < least:
            return ()
        found.append(data[at : at + min(size, _HEAD_BYTES)])
        at += size
    return found if at == end else ()
