"""Mutations of videos, made at the places where their headers are.

Input number `index` of a run with some `seed` depends only on these two numbers.
"""

import functools
import random
import re

import numpy as np

from server.imaging.video.track import MAX_FRAMES, Track
from tests.encoded_videos import encode, scene, with_edits
from tests.fuzz import media_mutations

_NAMES = re.compile(
    rb"moov|trak|tkhd|mdhd|elst|stsd|stts|ctts|stss|stsc|stsz|stco|moof|traf|tfhd|tfdt|trun|trex"
    rb"|avcC|\x1f\x43\xb6\x75|\x16\x54\xae\x6b|\x15\x49\xa9\x66|\xa3|\xa0|\xe7"
)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Small videos in every container and layout."""
    frames = scene(8, (32, 16))
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    return (
        with_edits(encode(frames), (120, 7200), (120, 14400)),
        encode(frames, "mpeg4", "mov"),
        encode(frames, options={"g": "3"}, muxing=fragments),
        encode(frames, "vp8", "webm"),
        encode(frames, "vp9", "webm", muxing={"live": "1"}),
        encode(frames, "h264", "matroska", rotation=90),
    )


def mutated(seed: int, index: int) -> bytes:
    """Video number `index`: a seed with some changes, most of them near the names of boxes."""
    rng = random.Random(f"video header {seed} {index}")
    data = bytearray(rng.choice(seeds()))
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        places = [found.end() for found in _NAMES.finditer(data)]
        if not places or rng.random() < 0.2:
            data = media_mutations.changed(rng, bytes(data))
            continue
        at = min(len(data) - 1, rng.choice(places) + rng.randrange(24))
        if rng.random() < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        else:
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = rng.choice((b"\0", b"\xff", b"\x7f")) * width
    return bytes(data)


def check(track: Track, data: bytes) -> None:
    """Raises AssertionError if `track`, which was read from `data`, contradicts itself."""
    samples, timeline = track.samples, track.timeline
    assert 0 < len(samples) <= MAX_FRAMES
    assert 0 < len(timeline.frames) == len(timeline.times) <= MAX_FRAMES
    assert samples.offsets.min() >= 0
    assert samples.sizes.min() > 0
    assert (samples.offsets + samples.sizes).max() <= len(data)
    assert 0 <= timeline.frames.min() <= timeline.frames.max() < len(samples)
    assert timeline.times[0] == 0
    assert (np.diff(timeline.times) >= 0).all()
    assert np.isfinite(timeline.duration_s)
    assert timeline.duration_s >= timeline.times[-1] - 1e-6
    assert min(track.coded_size) > 0
