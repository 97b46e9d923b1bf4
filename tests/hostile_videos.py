"""Videos that attack a decoder: other containers and codecs, and files whose headers lie."""

import functools
import struct
from io import BytesIO
from typing import Any

import av
import numpy as np

from server.imaging.video.header import read_track
from tests import clips
from tests.encoded_videos import encode, scene, video, with_box

_IN_STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
# Containers that FFmpeg writes, each with a codec that it takes.
_CONTAINERS = {
    "asf": "mpeg4",
    "avi": "mpeg4",
    "flv": "flv1",
    "h264": "libx264",
    "ivf": "libvpx",
    "m4v": "mpeg4",
    "mpeg": "mpeg1video",
    "mpegts": "mpeg2video",
    "mxf": "mpeg2video",
    "nut": "ffv1",
    "rawvideo": "rawvideo",
    "rm": "rv20",
    "swf": "flv1",
    "vob": "mpeg2video",
    "wtv": "mpeg2video",
    "yuv4mpegpipe": "rawvideo",
}
# What allowed containers may call other codecs: MagicYUV, HuffYUV, FFV1, Motion JPEG, PNG, ProRes,
# Animation, MPEG-2, H.263, Cinepak, VC-1, Sorenson, DNxHD, CineForm, encrypted or no names.
_CODES = (
    *(b"M8RG", b"MAGY", b"HFYU", b"FFVH", b"FFV1", b"mjpa", b"jpeg", b"png ", b"apch", b"rle "),
    *(b"m2v1", b"s263", b"cvid", b"vc-1", b"SVQ3", b"AVdn", b"CFHD", b"encv", b"raw ", bytes(4)),
)
_NAMES = (b"V_FFV", b"V_SNO", b"V_MJP", b"V_UNC", b"V_MS/", b"A_AAC")
_MANIFEST = b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://x/'


def _written(container: str, codec: str) -> bytes:
    """A video of three frames."""
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for pixel in scene(3, (176, 144)):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24").reformat(format="yuv420p")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@functools.cache
def foreign() -> dict[str, bytes]:
    """Files in other containers, and allowed containers that name other codecs."""
    mp4, webm = video(), video("vp8", "webm")
    at = _entry(mp4)
    return {
        **{name: _written(name, codec) for name, codec in _CONTAINERS.items()},
        **{repr(code): mp4[:at] + code + mp4[at + 4 :] for code in _CODES},
        **{repr(name): webm.replace(b"V_VP8", name) for name in _NAMES},
        "session description": clips.SDP,
        "playlist": clips.PLAYLIST,
        "list of files": clips.CONCAT,
        "manifest": _MANIFEST,
        "metadata": b";FFMETADATA1\ntitle=x\n",
        "nothing": b"",
    }


def _entry(mp4: bytes) -> int:
    """Where the name of the codec stands."""
    return mp4.index(b"avc1", mp4.index(b"stsd"))


def _table(name: bytes, *entries: int) -> bytes:
    return with_box(video(), (*_IN_STBL, name), struct.pack(f">{1 + len(entries)}I", 0, *entries))


@functools.cache
def lying() -> dict[str, bytes]:
    """Files in allowed containers that lie, are cut, or never end; none can be decoded."""
    mp4, webm = video(), video("vp8", "webm")
    at = _entry(mp4) + 4 + 24
    wide = mp4[:at] + b"\xff\xff\xff\xff" + mp4[at + 4 :]
    media = mp4.index(b"mdat") + 4
    return {
        "10^9 samples": _table(b"stsz", 1, 10**9),
        "chunks behind the file": _table(b"stco", 1, 2**32 - 1),
        "65535x65535": wide,
        "frames of zeros": mp4[:media] + bytes(900) + mp4[media + 900 :],
        "boxes in boxes": mp4[:32] + struct.pack(">I4s", 0, b"moov") * 100_000,
        "fragments without end": mp4[:32] + struct.pack(">I4s", 8, b"moof") * 100_000,
        "elements without end": webm[:200] + b"\xec\x80" * 400_000,
        "cut MP4": mp4[: len(mp4) // 2],
        "cut WebM": webm[:150],
        "MP4 of zeros": b"\0\0\0\x18ftypisom" + bytes(100_000),
        "WebM of zeros": b"\x1aE\xdf\xa3" + bytes(100_000),
    }


def odd() -> dict[str, bytes]:
    """Files in allowed containers whose times are nonsense, but whose frames can be decoded."""
    return {
        "10^9 durations of zero": _table(b"stts", 1, 10**9, 0),
        "durations of 2^32": _table(b"stts", 1, 12, 2**32 - 1),
        "chunks of 2^32 samples": _table(b"stsc", 1, 1, 2**32 - 1, 1),
    }


def repeated(
    times: int, size: tuple[int, int] = (1920, 1080), group: int = 1 << 30, flat: bool = False
) -> bytes:
    """A WebM file whose second frame follows `times` times, 40 in a second, with a keyframe after
    each `group` of them. `flat` frames are black, and small."""
    frames = np.zeros((2, size[1], size[0], 3), np.uint8)
    if not flat:
        frames[:] = scene(1, size)
    data = encode(frames, "vp8", "webm", muxing={"live": "1"})
    samples = read_track(data).samples
    key, other = (
        data[start : start + length]
        for start, length in zip(samples.offsets.tolist(), samples.sizes.tolist(), strict=True)
    )
    found = [data]
    for index in range(2, 2 + times):
        block = b"\x81\0\0" + (b"\0" + other if index % group else b"\x80" + key)
        found.append(b"\x1f\x43\xb6\x75\xff\xe7\x84" + struct.pack(">I", index * 25))
        found.append(b"\xa3" + struct.pack(">I", 0x10000000 | len(block)) + block)
    return b"".join(found)
