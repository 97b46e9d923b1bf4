"""Frames of animations and pages of TIFF files."""

import numpy as np
import pytest
from PIL import Image

from server.errors import (
    ImageFrameMissing,
    ImageTooLarge,
    InvalidImage,
    UnsupportedImageFormat,
)
from server.imaging.codecs import pillow
from server.imaging.decode import DecodeOptions, OpenAnimation, decode, frame_count
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


STILL = encoded.files(pictures.photo((24, 16)))


@pytest.mark.parametrize("name", STILL)
def test_still_pictures_have_one_frame(name: str) -> None:
    data = STILL[name]
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


def _odd_animations() -> dict[str, bytes]:
    """Frames that cover parts of the picture, are transparent, and are disposed of."""
    photo = pictures.photo((60, 40), 4)
    clear = photo.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    more = [photo.rotate(90), clear, photo.transpose(Image.Transpose.ROTATE_180), clear, photo]
    found = {}
    for kind in ("GIF", "PNG", "WEBP", "AVIF"):
        for first in (photo, clear):
            # AVIF needs the same mode in all frames.
            others = [image.convert(first.mode) for image in more] if kind == "AVIF" else more
            found[f"{kind} {first.mode}"] = pictures.encode(
                first, kind, save_all=True, append_images=others, duration=50
            )
    for disposal in (1, 2, 3):
        found[f"GIF disposal {disposal}"] = pictures.encode(
            clear.quantize(9),
            "GIF",
            save_all=True,
            append_images=[image.quantize(7) for image in more],
            disposal=disposal,
            transparency=2,
        )
    return found


ODD = _odd_animations()


@pytest.mark.parametrize("frames", [(0, 1, 2, 3, 4, 5), (0, 3, 4), (2, 2, 5)])
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("mode", ["RGB", None])
def test_one_pass_over_an_animation_gives_the_pixels_of_single_frames(
    name: str, frames: tuple[int, ...], mode: str | None
) -> None:
    animation = OpenAnimation()
    for frame in frames:
        options = DecodeOptions(mode, frame=frame)
        alone = decode(ODD[name], options)
        together = decode(ODD[name], options, None, animation)
        assert together.size == alone.size
        assert together.image.mode == alone.image.mode
        assert np.array_equal(np.asarray(together.image), np.asarray(alone.image))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_one_pass_decodes_each_frame_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    open_ = pillow.Image.open
    monkeypatch.setattr(
        pillow.Image, "open", lambda *args, **kw: opened.append(1) or open_(*args, **kw)
    )
    animation = OpenAnimation()
    data = _animation(kind)
    for frame in range(1, 4):
        decode(data, DecodeOptions(frame=frame), None, animation)
    assert len(opened) == 1


def test_frames_behind_a_damaged_one_are_refused_without_decoding_again() -> None:
    data = bytearray(_animation("PNG"))
    at = data.rindex(b"fdAT")
    data[at + 12 : at + 20] = bytes(8)
    animation = OpenAnimation()
    decode(bytes(data), DecodeOptions(frame=2), None, animation)
    for _ in range(2):
        with pytest.raises(InvalidImage):
            decode(bytes(data), DecodeOptions(frame=3), None, animation)


def test_tiff_pages_keep_their_own_sizes() -> None:
    pages = [Image.new("RGB", (10 * n, 7 * n), COLOURS[n]) for n in (1, 2, 3)]
    data = pictures.encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages):
        decoded = decode(data, DecodeOptions(frame=number))
        assert decoded.size == decoded.image.size == page.size


def test_counting_frames_stops_at_a_thousand() -> None:
    one = pictures.encode(Image.new("L", (1, 1)), "GIF")
    palette_end = 13 + (3 << (one[10] & 7) + 1)
    data = one[:palette_end] + one[palette_end:-1] * 1100 + one[-1:]
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
