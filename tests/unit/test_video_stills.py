"""Videos that are pictures: their headers, and frames equal to those that Pillow decodes."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageSequence

from server.errors import ClientError, InvalidVideo, VideoTooLarge
from server.imaging.video import animation, pictures, stills
from tests.encoded_videos import scene
from tests.pictures import encode

FRAMES = [Image.fromarray(frame) for frame in scene(8)]
LENGTHS = [100, 20, 500, 40, 0, 10, 1000, 70]
# Of no length or a hundredth of a second: shown as long as browsers show them.
TIMES = [0.0, 0.1, 0.12, 0.62, 0.66, 0.76, 0.86, 1.86]
MOST, WHITE, SEED = 1 << 24, (255, 255, 255), 5


def animated(kind: str) -> bytes:
    more = {"lossless": True} if kind == "WEBP" else {}
    return encode(
        FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], duration=LENGTHS, **more
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_has_the_times_and_frames_of_its_file(kind: str) -> None:
    data = animated(kind)
    header = animation.read(data)
    assert (header.form, header.size) == ("animation", (64, 48))
    assert header.times == pytest.approx(TIMES)
    assert header.duration_s == pytest.approx(1.93)
    decode_frame = stills.of_animation(data, MOST, WHITE)
    ours = stills.frames(decode_frame, (0, 2, 2, 7), header.size)
    theirs = [np.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(_opened(data))]
    for frame, index in zip(ours, (0, 2, 2, 7), strict=True):
        np.testing.assert_array_equal(frame, theirs[index])


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_damaged_animations_are_read_or_refused(kind: str) -> None:
    data, rng = animated(kind), random.Random(SEED)
    refused = 0
    for _ in range(300):
        bad = bytearray(data[: rng.randrange(20, len(data))])
        for _ in range(rng.randrange(4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            header = animation.read(bytes(bad))
        except ClientError:
            refused += 1
            continue
        assert (np.diff(header.times) > 0).all()
        assert header.duration_s > header.times[-1]
    assert refused


def test_an_animation_of_very_many_blocks_or_frames_is_refused() -> None:
    head = b"GIF89a\1\0\1\0\0\0\0"
    frame = b",\0\0\0\0\1\0\1\0\0\2\1\0\0"
    with pytest.raises(VideoTooLarge, match="more than 1000 frames"):
        animation.read(head + frame * 2000)
    with pytest.raises(VideoTooLarge, match="too many blocks"):
        animation.read(head + frame + b"!\xfe" + b"\1a" * (1 << 22))


def test_pictures_become_frames_in_their_order() -> None:
    files = [encode(frame, kind) for frame, kind in zip(FRAMES, ("PNG", "BMP") * 4, strict=True)]
    header = pictures.read(files)
    assert (header.form, header.size, header.frame_count) == ("pictures", (64, 48), 8)
    decode_frame = stills.of_pictures(pictures.pack(files), MOST, WHITE)
    half = stills.frames(decode_frame, (1, 6), header.size, (32, 24), lambda frame: frame[::2, ::2])
    np.testing.assert_array_equal(half, scene(8)[[1, 6], ::2, ::2])


def test_transparent_frames_lie_on_the_background() -> None:
    clear = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    decode_frame = stills.of_pictures(pictures.pack([clear]), MOST, (9, 8, 7))
    assert stills.frames(decode_frame, (0,), (4, 4)).reshape(-1, 3).tolist() == [[9, 8, 7]] * 16


def test_a_frame_that_contradicts_its_header_is_refused() -> None:
    packed = pictures.pack([encode(FRAMES[0])])
    for size, index in (((64, 49), 0), ((64, 48), 1)):
        with pytest.raises(InvalidVideo):
            stills.frames(stills.of_pictures(packed, MOST, WHITE), (index,), size)
    with pytest.raises(VideoTooLarge):
        stills.frames(stills.of_pictures(packed, 64 * 48 - 1, WHITE), (0,), (64, 48))
