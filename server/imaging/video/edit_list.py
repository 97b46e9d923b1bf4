"""Which samples of a track are shown, and when: times and edit lists.

ISO/IEC 14496-12, 8.6.6. Times are in ticks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from server.imaging.video.track import (
    MAX_TICKS,
    Integers,
    Samples,
    Timeline,
    check_count,
    damaged,
)


class Edit(NamedTuple):
    """Show what the media has from `media_time` on (-1: nothing) for `duration`, in ticks of the
    movie's time scale (0: to the end); `media_time` is in ticks of the track's."""

    duration: int
    media_time: int


@dataclass(frozen=True, eq=False)
class Media:
    """Samples in the order of decoding, and their times in ticks: `shown`, int64 (samples,), when
    each would be shown without edits; `durations`, int64 (samples,)."""

    samples: Samples
    shown: Integers
    durations: Integers

    @staticmethod
    def empty() -> "Media":
        none = np.empty(0, np.int64)
        return Media(Samples(none, none, np.empty(0, np.bool_)), none, none)

    @staticmethod
    def joined(pieces: Sequence["Media"]) -> "Media":
        samples = Samples(
            np.concatenate([each.samples.offsets for each in pieces]),
            np.concatenate([each.samples.sizes for each in pieces]),
            np.concatenate([each.samples.keyframes for each in pieces]),
        )
        shown = np.concatenate([each.shown for each in pieces])
        return Media(samples, shown, np.concatenate([each.durations for each in pieces]))

    def within(self, length: int) -> "Media":
        """Those samples that lie in a file of `length` bytes and are not empty."""
        samples = self.samples
        kept = (samples.sizes > 0) & (samples.offsets >= 0)
        kept &= samples.offsets + samples.sizes <= length
        if kept.all():
            return self
        inside = Samples(samples.offsets[kept], samples.sizes[kept], samples.keyframes[kept])
        return Media(inside, self.shown[kept], self.durations[kept])


def timeline(media: Media, edits: Sequence[Edit], timescale: int, movie_timescale: int) -> Timeline:
    """What is shown of `media`, which has samples. Edits that show nothing at all are ignored.

    Raises:
        InvalidVideo: there are no samples.
        VideoTooLarge: edits show samples more than `track.MAX_FRAMES` times.
    """
    if not len(media.samples):
        raise damaged("it has no frames")
    order = np.argsort(media.shown, kind="stable")
    return _edited(media, order, edits, timescale, movie_timescale) or _whole(
        media, order, timescale
    )


def _whole(media: Media, order: Integers, timescale: int) -> Timeline:
    times = media.shown[order] - media.shown[order[0]]
    end = int(times[-1]) + int(media.durations[order[-1]])
    return Timeline(order, times / timescale, end / timescale)


def _edited(
    media: Media, order: Integers, edits: Sequence[Edit], timescale: int, movie_timescale: int
) -> Timeline | None:
    """None if nothing is shown, or there are no edits."""
    sorted_times = media.shown[order]
    frames: list[Integers] = []
    times: list[Integers] = []
    at = end = count = 0
    for edit in edits:
        length = (edit.duration * timescale + movie_timescale // 2) // movie_timescale
        if edit.media_time >= 0:
            stop = edit.media_time + length if edit.duration else MAX_TICKS
            first, last = np.searchsorted(
                sorted_times, [min(edit.media_time, MAX_TICKS), min(stop, MAX_TICKS)]
            )
            if last > first:
                count += int(last - first)
                check_count(count)
                frames.append(order[first:last])
                times.append(sorted_times[first:last] + (at - edit.media_time))
                own_end = int(times[-1][-1]) + int(media.durations[order[last - 1]])
                if not edit.duration:
                    length = own_end - at
                end = min(own_end, at + length)
        at = min(at + length, MAX_TICKS)
    if not frames:
        return None
    shown = np.concatenate(times)
    start = int(shown[0])
    return Timeline(np.concatenate(frames), (shown - start) / timescale, (end - start) / timescale)
