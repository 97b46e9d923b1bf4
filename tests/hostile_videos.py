"""Videos that attack a decoder: other containers and codecs, and files whose headers lie."""

import contextlib
import functools
import re
import struct
from io import BytesIO
from typing import Any

import av

from tests import clips
from tests.encoded_videos import scene, video, with_box

_IN_STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
# Formats that FFmpeg both writes and reads, but for those that are accepted, pictures, devices,
# network protocols, and those that need an encoder that is not there.
_FORMATS = re.findall(
    r"\w+",
    """
    ac3 adx aiff alaw amr apm argo_asf asf ast au avi caf dfpwm eac3 f32be f32le f64be f64le
    fits flac flv g722 g726 g726le gxf h261 h263 h264 hevc ircam ivf kvag m4v mp3 mpeg mpegts
    mpjpeg mulaw mxf nut obu ogg rawvideo rm roq rso s16be s16le s24be s24le s32be s32le s8 sbc
    smjpeg sox spdif swf tta u16be u16le u24be u24le u32be u32le u8 vidc voc w64 wav wsaud wtv
    wv yuv4mpegpipe
    """,
)
# Of formats for speech and video calls, in Hz.
_LOW_RATE = 8000
# What allowed containers may call other codecs: MagicYUV, HuffYUV, FFV1, Motion JPEG, PNG, ProRes,
# Animation, MPEG-2, H.263, Cinepak, VC-1, Sorenson, DNxHD, CineForm, encrypted or no names.
_CODES = (
    *(b"M8RG", b"MAGY", b"HFYU", b"FFVH", b"FFV1", b"mjpa", b"jpeg", b"png ", b"apch", b"rle "),
    *(b"m2v1", b"s263", b"cvid", b"vc-1", b"SVQ3", b"AVdn", b"CFHD", b"encv", b"raw ", bytes(4)),
)
_NAMES = (b"V_FFV", b"V_SNO", b"V_MJP", b"V_UNC", b"V_MS/", b"A_AAC")
_MANIFEST = b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://x/'


def _written(name: str) -> bytes:
    """A video of three frames in a format, or a tenth of a second of silence if it takes none."""
    for write in (_write_video, _write_silence):
        file = BytesIO()
        with contextlib.suppress(ValueError, av.FFmpegError):
            with av.open(file, "w", format=name) as output:
                write(output)
            return file.getvalue()
    raise AssertionError(f"FFmpeg does not write {name}")


def _write_video(output: Any) -> None:
    stream = output.add_stream(output.default_video_codec, rate=25)
    formats = stream.codec_context.codec.video_formats
    stream.width, stream.height = 176, 144
    stream.pix_fmt = formats[0].name if formats else "yuv420p"
    for pixel in scene(3, (176, 144)):
        frame = av.VideoFrame.from_ndarray(pixel, format="rgb24")
        output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
    output.mux(stream.encode(None))


def _write_silence(output: Any) -> None:
    codec = output.default_audio_codec
    is_low = codec.startswith(("amr", "g7", "adpcm_g7"))
    stream = output.add_stream(codec, rate=_LOW_RATE if is_low else 48_000)
    stream.layout = "mono"
    frame = av.AudioFrame(format="s16", layout="mono", samples=4608)
    frame.rate = stream.rate
    frame.planes[0].update(bytes(2 * 4608))
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


@functools.cache
def foreign() -> dict[str, bytes]:
    """Files in other containers, and allowed containers that name other codecs."""
    mp4, webm = video(), video("vp8", "webm")
    at = _entry(mp4)
    return {
        **{name: _written(name) for name in _FORMATS},
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


def _nested(kind: bytes, depth: int, outermost: bytes | None = None) -> bytes:
    """Boxes of which each holds the next one."""
    sizes = range(8 * depth, 0, -8)
    kinds = [outermost or kind, *[kind] * (depth - 1)]
    return b"".join(
        struct.pack(">I4s", size, name) for size, name in zip(sizes, kinds, strict=True)
    )


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
        "moov in moov": mp4[:32] + _nested(b"moov", 60_000),
        "tracks in tracks": mp4[:32] + _nested(b"trak", 1000, b"moov"),
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
