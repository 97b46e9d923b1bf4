"""Identifies the container of a video or audio clip by its first bytes, before decoding.

FFmpeg guesses the format of its input, and some formats are lists of other files and addresses,
which it then opens. So only containers that hold all of their data are accepted.
"""

import struct
from collections.abc import Iterator
from typing import Literal, TypeAlias

import pybase64

from server.errors import (
    InvalidImage,
    InvalidVideo,
    UnsupportedAudioFormat,
    UnsupportedVideoFormat,
)
from server.imaging.header.boxes import FULL, Box, boxes, whole

VideoContainer: TypeAlias = Literal["mp4", "matroska"]
AudioContainer: TypeAlias = Literal["wav", "flac", "ogg", "mp3"] | VideoContainer

# The types of the first box of an MP4 file, or of a QuickTime file from before MP4.
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# The path to the boxes of an MP4 file that name the file with a track's samples.
_TO_REFERENCES = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
# The length of a box's version, flags and count.
_REFERENCE_FIELDS = FULL + 4
# As many base64 characters as identify a picture.
_HEAD_CHARACTERS = 16
_ID3_HEADER_BYTES = 10
_ID3_HAS_FOOTER = 0x10


def video_container(data: bytes) -> VideoContainer:
    """The container of a video.

    Raises:
        UnsupportedVideoFormat: the container is not supported.
    """
    container = _with_pictures(data)
    if container is None:
        raise UnsupportedVideoFormat(
            "the video is not in a supported format (MP4, MOV, Matroska, WebM)"
        )
    return container


def has_video_container(data: bytes) -> bool:
    """Whether `data` is in a container of videos. Pictures and audio clips may be, too."""
    return _with_pictures(data) is not None


def audio_container(data: bytes) -> AudioContainer:
    """The container of an audio clip, which may also be a video with sound.

    Raises:
        UnsupportedAudioFormat: the container is not supported.
    """
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"fLaC":
        return "flac"
    if data[:4] == b"OggS":
        return "ogg"
    # Decoders skip an ID3 tag before they guess the format, so what follows it counts.
    start = _behind_id3(data)
    if data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] >= b"\xe0":
        return "mp3"
    if data[start : start + 4] == b"fLaC":
        return "flac"
    container = _with_pictures(data)
    if container is None:
        raise UnsupportedAudioFormat(
            "the audio clip is not in a supported format "
            "(WAV, FLAC, Ogg, MP3, MP4, M4A, Matroska, WebM)"
        )
    return container


def is_picture(data: bytes) -> bool:
    """Whether `data` is a JPEG, PNG or WebP picture, of which a video may be a series."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def holds_pictures(text: bytes | memoryview) -> bool:
    """Whether `text` is a picture in base64. A video may be sent as a list of such texts, separated
    by commas."""
    try:
        return is_picture(pybase64.b64decode(bytes(text[:_HEAD_CHARACTERS]), validate=True))
    except ValueError:
        return False


def refuse_references(data: bytes) -> None:
    """Refuse an MP4 file with a track whose samples are in another file.

    FFmpeg does not follow such references by default; the check gives a clear error. A damaged file
    is left to the decoder. The time grows with the number of boxes.

    Raises:
        InvalidVideo: a track refers to another file.
    """
    try:
        locations = any(
            any(data[entry.start + FULL : entry.end])
            for references in _boxes_at(data, whole(data), _TO_REFERENCES)
            for entry in boxes(data, references, _REFERENCE_FIELDS)
        )
    except (InvalidImage, struct.error):  # damaged
        return
    if locations:
        raise InvalidVideo("the video refers to other files or addresses for its data")


def _with_pictures(data: bytes) -> VideoContainer | None:
    if data[4:8] in _FIRST_BOXES:
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return None


def _behind_id3(data: bytes) -> int:
    """The offset behind the ID3v2 tag, or 0 if `data` does not begin with one."""
    if data[:3] != b"ID3" or len(data) < _ID3_HEADER_BYTES:
        return 0
    size = 0
    for byte in data[6:_ID3_HEADER_BYTES]:
        size = size << 7 | byte & 0x7F
    footer = _ID3_HEADER_BYTES if data[5] & _ID3_HAS_FOOTER else 0
    return _ID3_HEADER_BYTES + size + footer


def _boxes_at(data: bytes, parent: Box, path: tuple[bytes, ...]) -> Iterator[Box]:
    """All boxes at `path` below `parent`."""
    for box in boxes(data, parent):
        if box.kind == path[0]:
            if len(path) == 1:
                yield box
            else:
                yield from _boxes_at(data, box, path[1:])
