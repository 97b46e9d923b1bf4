"""Frames of animations and pages of TIFF files."""

import numpy as np
import pytest
from PIL import Image

from server.errors import ImageFrameMissing, ImageTooLarge, UnsupportedImageFormat
from server.imaging.codecs import pillow
from server.imaging.decode import DecodeOptions, decode, frame_count
from tests import encoded, pictures

COLOURS = [(200, 40, 30), (20, 140, 150), (250, 250, 10), (90, 90, 90)]
SIZE = (40, 30)


def _animation(kind: str) -> bytes:
    frames = [Image.new("RGB", SIZE, colour) for colour in COLOURS]
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    return pictures.encode(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options
    )


@pytest.mark.parametrize("frame", range(4))
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_each_frame_can_be_selected(kind: str, frame: int) -> None:
    options = {"duration": 50} if kind == "TIFF" else {}
    del options
    decoded = decode(_animation(kind), DecodeOptions(frame=frame))
    assert decoded.size == decoded.image.size == SIZE
    shown = np.asarray(decoded.image)[15, 20].astype(int)
    assert np.abs(shown - COLOURS[frame]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_frames_are_counted(kind: str) -> None:
    data = _animation(kind)
    assert frame_count(data) == 4
    for missing in (4, 999, 1000, 10**9):
        with pytest.raises(ImageFrameMissing, match=f"no frame {missing + 1}"):
            decode(data, DecodeOptions(frame=missing))


@pytest.mark.parametrize("name", encoded.files(Image.new("RGB", (16, 16))))
def test_still_pictures_have_one_frame(name: str) -> None:
    data = encoded.files(pictures.photo((24, 16)))[name]
    count = 2 if "animated" in name else 1
    assert frame_count(data) == count
    with pytest.raises(ImageFrameMissing):
        decode(data, DecodeOptions(frame=count))


def test_frames_are_composed_over_earlier_frames() -> None:
    first = Image.new("RGB", SIZE, (200, 0, 0))
    second = first.copy()
    second.paste((0, 0, 200), (0, 0, 20, 30))
    data = pictures.encode(first, "GIF", save_all=True, append_images=[second])
    shown = np.asarray(decode(data, DecodeOptions(frame=1)).image)
    assert tuple(shown[15, 5]) == (0, 0, 200)
    assert tuple(shown[15, 35]) == (200, 0, 0)


def test_tiff_pages_keep_their_own_sizes() -> None:
    pages = [Image.new("RGB", (10 * n, 7 * n), COLOURS[n]) for n in (1, 2, 3)]
    data = pictures.encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages):
        decoded = decode(data, DecodeOptions(frame=number))
        assert decoded.size == decoded.image.size == page.size


def test_counting_frames_stops_at_a_thousand() -> None:
    frames = [Image.new("L", (1, 1), n % 256) for n in range(1100)]
    data = pictures.encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert frame_count(data) == 1000
    assert decode(data, DecodeOptions(frame=999)).size == (1, 1)
    with pytest.raises(ImageFrameMissing):
        decode(data, DecodeOptions(frame=1000))


def test_a_frame_that_takes_too_much_work_to_reach_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pillow, "MAX_ANIMATED_PIXELS", 3 * SIZE[0] * SIZE[1])
    data = _animation("GIF")
    decode(data, DecodeOptions(frame=2))
    with pytest.raises(ImageTooLarge, match="decoding up to frame 4 takes 4800 pixels.*3600"):
        decode(data, DecodeOptions(frame=3))


def test_counting_frames_of_data_that_is_not_an_image_is_refused() -> None:
    with pytest.raises(UnsupportedImageFormat):
        frame_count(b"%PDF-1.7")
