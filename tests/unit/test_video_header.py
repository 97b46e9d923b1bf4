"""The header reader of videos agrees with FFmpeg, refuses damaged files, and does bounded work."""

import contextlib
import functools
import random
import struct
import tracemalloc
from itertools import count, takewhile

import numpy as np
import pytest

from server.errors import ClientError, InvalidVideo, UnsupportedVideoFormat, VideoTooLarge
from server.imaging.video import header, matroska, mp4
from server.imaging.video.track import MAX_FRAMES
from tests import clips, hostile_videos
from tests.encoded_videos import encode, scene, seen, video, with_box, with_edits
from tests.fuzz import video_mutations

KINDS = [
    ("h264", "mp4"),
    ("h264", "mov"),
    ("h264", "matroska"),
    ("hevc", "mp4"),
    ("hevc", "matroska"),
    ("vp8", "webm"),
    ("vp9", "webm"),
    ("vp9", "mp4"),
    ("av1", "mp4"),
    ("av1", "webm"),
    ("mpeg4", "mp4"),
    ("mpeg4", "matroska"),
]
STEPS = np.random.default_rng(1).uniform(0.02, 0.3, 12)
UNEVEN = (np.cumsum(STEPS) - STEPS).tolist()
IN_STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
SEED = 3


def assert_equal_to_ffmpeg(data: bytes, most_off_s: float = 1e-6) -> header.VideoHeader:
    ours, theirs = header.read(data), seen(data)
    assert ours.coded_size == theirs.size
    assert ours.rotation == theirs.rotation
    assert ours.frame_count == len(theirs.times)
    np.testing.assert_allclose(ours.times, theirs.times, atol=most_off_s)
    return ours


@pytest.mark.parametrize(("codec", "container"), KINDS)
def test_frame_times_and_sizes_equal_ffmpegs(codec: str, container: str) -> None:
    found = assert_equal_to_ffmpeg(video(codec, container))
    assert found.codec == codec
    assert found.form == ("mp4" if container in ("mp4", "mov") else "matroska")
    assert found.fps == pytest.approx(25)
    assert found.duration_s == pytest.approx(12 / 25)


@pytest.mark.parametrize(("codec", "container"), KINDS[:-2])
def test_frame_times_of_a_variable_rate_equal_ffmpegs(codec: str, container: str) -> None:
    found = assert_equal_to_ffmpeg(encode(scene(12), codec, container, times=UNEVEN))
    np.testing.assert_allclose(found.times, UNEVEN, atol=1e-3)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_rotations_equal_ffmpegs(container: str, rotation: int) -> None:
    found = assert_equal_to_ffmpeg(encode(scene(3), "h264", container, rotation=rotation))
    assert found.rotation == rotation
    assert found.size == ((48, 64) if rotation in (90, 270) else (64, 48))


@pytest.mark.parametrize(
    "flags",
    [
        "faststart",
        "frag_keyframe+empty_moov",
        "frag_keyframe+empty_moov+default_base_moof+delay_moov",
        "frag_every_frame+empty_moov",
        "frag_keyframe",
    ],
)
def test_other_layouts_of_mp4_files_are_read(flags: str) -> None:
    data = encode(scene(30), options={"g": "10"}, muxing={"movflags": flags})
    assert assert_equal_to_ffmpeg(data).frame_count == 30


@pytest.mark.parametrize("muxing", [{"live": "1"}, {"cluster_time_limit": "100"}])
def test_other_layouts_of_matroska_files_are_read(muxing: dict[str, str]) -> None:
    assert assert_equal_to_ffmpeg(encode(scene(30), "vp8", "webm", muxing=muxing)).frame_count == 30


@pytest.mark.parametrize("codec", ["vp8", "vp9"])
def test_frames_that_are_only_referred_to_are_not_counted(codec: str) -> None:
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
    assert assert_equal_to_ffmpeg(encode(scene(60), codec, "webm", options=options))


@pytest.mark.parametrize(
    ("codec", "pixels", "size"),
    [
        ("h264", "yuv444p", (63, 47)),
        ("vp9", "yuv420p", (63, 47)),
        ("hevc", "yuv420p10le", (64, 48)),
    ],
)
def test_odd_sizes_and_deep_colours_are_read(
    codec: str, pixels: str, size: tuple[int, int]
) -> None:
    found = assert_equal_to_ffmpeg(encode(scene(4, size), codec, "mp4", pixels=pixels))
    assert found.size == size


@functools.cache
def with_b_frames() -> bytes:
    """30 frames at 25 in a second; the first is shown two frames after it is decoded."""
    return encode(scene(30), options={"g": "10", "bf": "2"})


@pytest.mark.parametrize(
    "edits",
    [
        [(500, 7200)],
        [(500, 14400)],
        [(1000, -1), (400, 7200)],
        [(400, 7200), (400, 54000)],
        [(400, 54000), (400, 7200)],
    ],
)
def test_edit_lists_are_applied_as_ffmpeg_does(edits: list[tuple[int, int]]) -> None:
    found = assert_equal_to_ffmpeg(with_edits(with_b_frames(), *edits))
    assert found.duration_s == pytest.approx(sum(length for length, at in edits if at >= 0) / 1e3)


def test_an_edit_list_that_shows_nothing_is_ignored() -> None:
    assert header.read(with_edits(with_b_frames(), (500, 1 << 30))).frame_count == 30


@pytest.mark.parametrize(
    ("lacing", "table"), [(0x02, b"\2\1\1"), (0x04, b"\2"), (0x06, b"\2\x81\xbf")]
)
def test_blocks_of_several_frames_are_read(lacing: int, table: bytes) -> None:
    """Three frames of one byte each; their times count on from the block's."""
    whole = encode(scene(1), "vp8", "webm", muxing={"live": "1"})
    contents = b"\x81\0\x28" + bytes([lacing]) + table + b"\x10\x10\x10"
    found = matroska.read(whole + b"\xa3" + bytes([0x80 | len(contents)]) + contents)
    assert found.samples.sizes[1:].tolist() == [1, 1, 1]
    np.testing.assert_allclose(found.timeline.times, [0, 0.04, 0.08, 0.12], atol=1e-6)


# ---------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("data", [b"", clips.SDP, clips.PLAYLIST, b"RIFF\0\0\0\0AVI LIST"])
def test_other_containers_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedVideoFormat, match="MP4, MOV, Matroska, WebM"):
        header.read(data)


@pytest.mark.parametrize("name", hostile_videos.foreign())
def test_no_other_format_that_ffmpeg_reads_is_accepted(name: str) -> None:
    with pytest.raises(UnsupportedVideoFormat):
        header.read(hostile_videos.foreign()[name])


@pytest.mark.parametrize("name", hostile_videos.lying())
def test_files_that_lie_are_refused_or_their_frames_are(name: str) -> None:
    """Where the header holds, all of its samples lie in the file."""
    data = hostile_videos.lying()[name]
    with contextlib.suppress(InvalidVideo, VideoTooLarge):
        video_mutations.check(header.read_track(data), data)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "FFV1"), ("mkv", "FFV1"), ("mkv", "MJPG")]
)
def test_other_codecs_are_refused(container: str, codec: str) -> None:
    with pytest.raises(UnsupportedVideoFormat, match="codec .*not supported"):
        header.read(clips.video(f".{container}", codec))


def many(table: bytes, *entries: int) -> bytes:
    """A video whose box `table` has these numbers."""
    return with_box(video(), (*IN_STBL, table), struct.pack(f">{1 + len(entries)}I", 0, *entries))


LYING = {
    "10^9 samples of one byte": many(b"stsz", 1, 10**9),
    "10^9 samples without sizes": many(b"stsz", 0, 10**9),
    "10^6 samples of one byte": many(b"stsz", 1, 10**6),
    "samples of no bytes": many(b"stsz", 0, 3, 0, 0, 0),
    "10^9 durations of zero": many(b"stts", 1, 10**9, 0),
    "durations that add up": many(b"stts", 3, *(2**32 - 1, 2**32 - 1) * 3),
    "chunks of 2^32 samples": many(b"stsc", 2, 1, 2**32 - 1, 1, 2, 2**32 - 1, 1),
    "chunks that do not exist": many(b"stsc", 1, 2**31, 1, 1),
    "no chunks": many(b"stco", 0),
    "chunks behind the file": many(b"stco", 1, 2**32 - 1),
    "keyframes that do not exist": many(b"stss", 3, 0, 2**32 - 1, 9000),
    "no keyframes": many(b"stss", 0),
    "cut in the samples": video()[: len(video()) // 3],
    "boxes in boxes": (b"\0\0\0\x10ftypisom" + bytes(4)) + struct.pack(">I4s", 0, b"moov") * 9000,
    "boxes without end": b"\0\0\0\x0cftypisom" + struct.pack(">I4s", 8, b"moof") * 100_000,
    "elements without end": video("vp8", "webm") + b"\xec\x80" * 200_000,
    "clusters in clusters": video("vp8", "webm") + b"\x1f\x43\xb6\x75\xff" * 100_000,
    "frames of one byte": video("vp8", "webm") + b"\xa3\x85\x81\0\0\x80\x10" * 100_000,
}


@pytest.mark.parametrize("name", LYING)
def test_the_work_and_the_memory_for_a_lying_file_are_bounded(name: str) -> None:
    tracemalloc.start()
    try:
        frames = header.read(LYING[name]).frame_count
    except (InvalidVideo, VideoTooLarge):
        frames = 0
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert frames <= len(LYING[name]) / 5
    assert peak < 160 << 20


def test_too_many_frames_are_refused_before_they_are_counted() -> None:
    with pytest.raises(VideoTooLarge, match=f"1000000000 frames, the limit is {MAX_FRAMES}"):
        header.read(LYING["10^9 samples of one byte"])


def test_frames_that_the_file_does_not_hold_are_not_counted() -> None:
    data = encode(scene(30), muxing={"movflags": "faststart"})
    assert 0 < header.read(data[: len(data) * 2 // 3]).frame_count < 30
    data = video("vp8", "webm", count=30)
    assert 0 < header.read(data[: len(data) // 2]).frame_count < 30


def test_zero_durations_give_a_rate_of_zero() -> None:
    still = with_edits(many(b"stts", 1, 12, 0), (0, 0))
    found = header.read(with_box(still, (*IN_STBL, b"ctts"), bytes(8)))
    assert (found.duration_s, found.fps, found.times.tolist()) == (0, 0, [0] * 12)


def test_mutated_files_are_read_or_refused() -> None:
    """`tests/fuzz/fuzz_decoders.py --what videos` goes on from here."""
    read = 0
    for index in range(1500):
        data = video_mutations.mutated(SEED, index)
        try:
            found = header.read_track(data)
        except ClientError:
            continue
        video_mutations.check(found, data)
        read += 1
    assert 300 < read < 1400


def test_an_edit_to_the_end_is_followed_by_others() -> None:
    """Once found by fuzzing: their frames were shown too early."""
    found = header.read(with_edits(with_b_frames(), (0, 7200), (120, 7200)))
    assert found.frame_count == 33
    assert (np.diff(found.times) > 0).all()


def test_negative_sizes_in_a_block_are_refused() -> None:
    """Once found by fuzzing: a frame was looked for before the start of the file."""
    whole = encode(scene(1), "vp8", "webm", muxing={"live": "1"})
    contents = b"\x81\0\x28\x06\x02\x81\x01\0\0\0\0\0\0\x01\x10\x10\x10"
    with pytest.raises(InvalidVideo):
        matroska.read(whole + b"\xa3" + bytes([0x80 | len(contents)]) + contents)


def test_readers_refuse_random_bytes() -> None:
    rng = random.Random(SEED)
    for size in takewhile(lambda size: size < 4000, (3 * index for index in count())):
        for read in (mp4.read, matroska.read):
            with pytest.raises(ClientError):
                read(rng.randbytes(size))
