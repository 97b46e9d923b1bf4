"""Chosen frames of a video equal those that OpenCV decodes, wherever decoding starts."""

import functools
import io
import re
from typing import Any

import cv2
import numpy as np
import pytest

from server.errors import InvalidVideo
from server.imaging.video import header, references
from server.imaging.video.frames import decode
from tests.encoded_videos import X265_ALONE, Frames, encode, scene, seen, stripped

SIZE = (96, 64)
COUNT = 30
GOPS = "keyint=8:bframes=3:min-keyint=1:scenecut=0:open-gop={}"
CLIPS: dict[str, dict[str, Any]] = {
    "H.264": {},
    "H.264 in Matroska": {"container": "matroska"},
    "H.264 with closed groups": {"options": {"x264-params": GOPS.format(0)}},
    "H.264 with open groups": {"options": {"x264-params": GOPS.format(1)}},
    "H.264 refreshed piece by piece": {"options": {"x264-params": "intra-refresh=1:keyint=8"}},
    "H.264 in fragments": {
        "muxing": {"movflags": "frag_keyframe+empty_moov"},
        "options": {"g": "7"},
    },
    "H.264 4:4:4": {"pixels": "yuv444p"},
    "H.264 BT.709": {"colors": lambda context: setattr(context, "colorspace", 1)},
    "H.264 full range": {"pixels": "yuvj420p"},
    "H.265": {"codec": "hevc"},
    "H.265 with open groups": {
        "codec": "hevc",
        "options": {"x265-params": f"{GOPS.format(1)}:{X265_ALONE}"},
    },
    "H.265 in sub-layers": {
        "codec": "hevc",
        "options": {"x265-params": f"temporal-layers=1:bframes=4:{X265_ALONE}"},
    },
    "H.265 10 bits": {"codec": "hevc", "pixels": "yuv420p10le"},
    "VP8": {"codec": "vp8", "container": "webm"},
    "VP9": {"codec": "vp9", "container": "webm"},
    "VP9 with alpha": {"codec": "vp9", "container": "webm", "pixels": "yuva420p"},
    "MPEG-4 part 2": {"codec": "mpeg4"},
}


@functools.cache
def clip(name: str) -> bytes:
    return encode(scene(COUNT, SIZE), **CLIPS[name])


@functools.cache
def opencv(data: bytes) -> Frames:
    """All frames as OpenCV decodes them: uint8 (frames, height, width, 3), RGB."""
    stream: Any = io.BytesIO(data)
    capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, [])
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.array(frames)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_equal_opencvs(name: str) -> None:
    np.testing.assert_array_equal(decode(clip(name), range(COUNT)), opencv(clip(name)))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("indices", [[29], [0, 29], [7, 8, 9], [23, 6, 15, 6]])
def test_chosen_frames_equal_those_of_the_whole_video(name: str, indices: list[int]) -> None:
    np.testing.assert_array_equal(decode(clip(name), indices), opencv(clip(name))[indices])


@pytest.mark.parametrize("name", ["H.264", "H.265", "H.265 in sub-layers"])
def test_frames_that_no_other_one_needs_are_not_given_to_the_decoder(name: str) -> None:
    track = header.read_track(clip(name))
    last = int(track.timeline.frames[-1])
    given = [sample for sample, _ in references.needed(clip(name), track, 0, last, {last})]
    assert last in given
    assert len(given) <= 0.7 * COUNT


def test_a_frame_is_kept_that_only_a_higher_sub_layer_needs() -> None:
    """Each frame refers to the one before it. Frame 5 says that none of its sub-layer does."""
    plain = encode(scene(8, SIZE), "hevc", options={"x265-params": f"bframes=0:ref=1:{X265_ALONE}"})
    data = bytearray(plain)
    samples = header.read_track(plain).samples
    starts = samples.offsets + 4
    assert data[starts[5]] >> 1 == data[starts[7]] >> 1 == 1
    data[starts[5]] = 0
    for start in starts[6:]:
        data[start + 1] = 2
    np.testing.assert_array_equal(decode(bytes(data), [7]), decode(plain, [7]))
    track = header.read_track(bytes(data))
    given = [sample for sample, _ in references.needed(bytes(data), track, 0, 5, {4})]
    assert given == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["H.264", "H.264 with open groups", "VP8"])
def test_a_file_says_how_many_frames_a_decoder_holds_back(name: str) -> None:
    found = references.reordered(header.read_track(clip(name)))
    assert found == (0 if name == "VP8" else 2)


def test_frames_of_a_file_that_is_wrong_about_their_order_are_found() -> None:
    """A decoder that holds back too few frames loses some. The times of the file are those of
    decoding here, and the stream does not say how many frames come too early."""
    plain = clip("H.264 with closed groups")
    sets = header.read_track(plain).configuration
    bits = "".join(f"{byte:08b}" for byte in sets)
    # bitstream_restriction_flag with the fields that x264 writes behind it.
    at = re.search("1111(?=(0001[01]{3}){2}(011|010))", bits)
    assert at is not None
    changed = bits[: at.start()] + "0" + bits[at.start() + 1 :]
    data = plain.replace(sets, bytes(int(changed[i : i + 8], 2) for i in range(0, len(bits), 8)))
    data = data.replace(b"ctts", b"free").replace(b"edts", b"free")
    track = header.read_track(data)
    assert references.reordered(track) == 0
    shown = header.read_track(plain).timeline.frames  # the samples in the order shown
    np.testing.assert_array_equal(decode(data, shown), decode(plain, range(COUNT)))


def test_av1_is_decoded() -> None:
    """OpenCV has no decoder of it."""
    data = encode(scene(COUNT, SIZE), "av1", "webm")
    theirs = np.array(seen(data).frames)
    np.testing.assert_array_equal(decode(data, [3, 17, 29]), theirs[[3, 17, 29]])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_upright(rotation: int) -> None:
    data = encode(scene(4, SIZE), rotation=rotation)
    frames = decode(data, range(4))
    assert frames.shape[1:3] == header.read(data).size[::-1]
    np.testing.assert_array_equal(frames, opencv(data))


@pytest.mark.parametrize("rotation", [0, 90])
def test_frames_are_shrunk_to_a_size(rotation: int) -> None:
    data = encode(scene(4, (384, 256)), rotation=rotation)
    size = (96, 64) if rotation == 0 else (64, 96)
    small, large = decode(data, [2], size)[0], decode(data, [2])[0]
    assert small.shape == (size[1], size[0], 3)
    wanted = cv2.resize(large, size, interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - wanted).mean() < 4


@pytest.mark.parametrize("rotation", [0, 90])
def test_each_frame_is_resized_as_it_comes(rotation: int) -> None:
    data = encode(scene(4, (384, 256)), rotation=rotation)
    shapes = []

    def halved(frame: Frames) -> Frames:
        shapes.append(frame.shape)
        return frame[::2, ::2]

    whole = decode(data, [0, 2])
    size = (whole.shape[2] // 2, whole.shape[1] // 2)
    np.testing.assert_array_equal(decode(data, [0, 2], size, resize=halved), whole[:, ::2, ::2])
    assert shapes == [whole.shape[1:]] * 2


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_samples_without_their_first_byte_are_decoded(codec: str) -> None:
    same = scene(1, SIZE).repeat(6, axis=0)
    plain = encode(same, codec, "matroska", options={"g": "1" if codec == "vp8" else "3"})
    data = stripped(plain, b"V_VP8" if codec == "vp8" else b"V_MPEG4/ISO/AVC")
    if codec == "vp8":  # or the bit that says that a frame is shown would be that of another byte
        assert not data[header.read_track(data).samples.offsets[0]] & 0x10
    np.testing.assert_array_equal(decode(data, range(6)), decode(plain, range(6)))


def test_odd_sizes_are_decoded() -> None:
    frames = scene(4, (63, 47))
    data = encode(frames, "vp9", "webm")
    assert decode(data, range(4)).shape == frames.shape
    np.testing.assert_array_equal(decode(data, range(4)), opencv(data))


def test_hdr_is_reduced_to_the_usual_range() -> None:
    """Half of the frame has 203 nits, the usual white of PQ; half has 10 000."""
    levels = np.full((4, 64, 96, 3), round(0.58 * 255), np.uint8)
    levels[:, :, 48:] = 255

    def colors(context: Any) -> None:
        context.colorspace, context.color_primaries, context.color_trc = 9, 9, 16

    data = encode(levels, "hevc", "matroska", pixels="yuv420p10le", colors=colors)
    usual, bright = decode(data, [1])[0][:, 8:40].mean(), decode(data, [1])[0][:, 56:88].mean()
    assert 150 < usual < bright


def test_a_damaged_frame_is_replaced_with_the_nearest_one() -> None:
    data = bytearray(clip("VP8"))
    samples = header.read_track(bytes(data)).samples
    start, size = int(samples.offsets[29]), int(samples.sizes[29])
    data[start + 1 : start + size] = b"\xff" * (size - 1)
    first, second = decode(bytes(data), [20, 29])
    np.testing.assert_array_equal(first, opencv(clip("VP8"))[20])
    assert second.shape == first.shape


def test_a_video_without_decodable_frames_is_refused() -> None:
    data = bytearray(clip("H.264"))
    samples = header.read_track(bytes(data)).samples
    for start, size in zip(samples.offsets, samples.sizes, strict=True):
        data[start : start + size] = bytes(int(size))
    with pytest.raises(InvalidVideo, match="none of the chosen frames"):
        decode(bytes(data), [0, 5])


def test_frames_with_more_pixels_than_allowed_are_not_decoded() -> None:
    with pytest.raises(InvalidVideo):
        decode(clip("H.264"), [0], max_pixels=64 * 48)
