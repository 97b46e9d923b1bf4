"""ISO-BMFF and QuickTime files: MP4, MOV, M4V, 3GP, and their fragmented forms.

ISO/IEC 14496-12. The first enabled video track is read.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from server.errors import InvalidImage, InvalidVideo, UnsupportedVideoFormat
from server.imaging.header.boxes import FULL, Box, Fields, boxes, children, unsigned
from server.imaging.video import fragments, sample_tables
from server.imaging.video.edit_list import Edit, Media, timeline
from server.imaging.video.track import CODECS, Codec, Rotation, Track, damaged, quarter_turns

# Boxes of a file, and fragments among them.
_MAX_TOP = 1 << 18
_MAX_EDITS = 1024
_HEAD = struct.Struct(">I4s")

# Four-character codes of sample entries, and the box with the decoder's settings.
_ENTRIES: dict[bytes, tuple[Codec, bytes]] = {
    b"avc1": ("h264", b"avcC"),
    b"avc3": ("h264", b"avcC"),
    b"hvc1": ("hevc", b"hvcC"),
    b"hev1": ("hevc", b"hvcC"),
    b"vp08": ("vp8", b""),
    b"vp09": ("vp9", b""),
    b"av01": ("av1", b"av1C"),
    b"mp4v": ("mpeg4", b"esds"),
}
# The fields of a visual sample entry before its boxes.
_ENTRY_FIELDS = 78
_MPEG4_VISUAL = 0x20


def read(data: bytes) -> Track:
    """The first enabled video track of an MP4 or MOV file.

    Raises:
        InvalidVideo: the file is damaged, has no frames, or refers to other files.
        UnsupportedVideoFormat: its codec is not supported.
        VideoTooLarge: it has more than `track.MAX_FRAMES` frames.
    """
    try:
        return _read(data)
    except (InvalidImage, IndexError, struct.error):
        raise damaged("its boxes are not those of a video") from None


def _read(data: bytes) -> Track:
    top = list(islice(_top(data), _MAX_TOP))
    movie = next((box for box in top if box.kind == b"moov"), None)
    if movie is None:
        raise damaged("it has no moov box")
    track = _chosen(data, movie)
    table = children(data, _box(track.media, b"minf"))
    _refuse_references(data, table)
    found = children(data, _box(table, b"stbl"))
    codec, size, configuration = _sample_entry(data, _box(found, b"stsd"))
    parts = {box.kind: box for box in _whole_boxes(data, movie)}
    timescale = _timescale(data, _box(track.media, b"mdhd"))
    media = sample_tables.read(data, found)
    edits = list(_edits(data, track.parts))
    if b"mvex" in parts:
        moofs = [box for box in top if box.kind == b"moof"]
        number, defaults = track.number, _box(parts, b"mvex")
        media = Media.joined([media, *fragments.read(data, moofs, number, defaults)])
    header = parts.get(b"mvhd")
    scale = _timescale(data, header) if header is not None else timescale
    media = media.within(len(data))
    return Track(
        container="mp4",
        codec=codec,
        coded_size=size,
        rotation=_rotation(data, track.parts.get(b"tkhd"), header),
        samples=media.samples,
        timeline=timeline(media, edits, timescale, scale),
        configuration=configuration,
    )


def _top(data: bytes) -> Iterator[Box]:
    """The boxes of the file; the last one may be cut."""
    start = 0
    while len(data) - start >= _HEAD.size:
        size, kind = _HEAD.unpack_from(data, start)
        contents = start + _HEAD.size
        if size == 1 and len(data) - contents >= 8:
            size = unsigned(data, contents, 8)
            contents += 8
        elif size == 0:
            size = len(data) - start
        if size < contents - start:
            return
        yield Box(kind, contents, min(start + size, len(data)))
        start += size


def _whole_boxes(data: bytes, parent: Box) -> Iterator[Box]:
    """The boxes in `parent`, up to one that is cut or damaged."""
    with suppress(InvalidImage, struct.error):
        yield from boxes(data, parent)


def _box(parts: dict[bytes, Box], kind: bytes) -> Box:
    if kind not in parts:
        raise damaged(f"it has no {kind.decode()} box")
    return parts[kind]


# ---------------------------------------------------------------------- the track


class _Trak:
    """A track: its number, its boxes, and those of its media."""

    def __init__(self, data: bytes, box: Box) -> None:
        self.parts = children(data, box)
        header = self.parts.get(b"tkhd")
        self.enabled = header is not None and bool(data[header.start + 3] & 1)
        number_at = 20 if header is not None and data[header.start] == 1 else 12
        self.number = unsigned(data, header.start + number_at, 4) if header is not None else 0
        self.media = children(data, self.parts[b"mdia"]) if b"mdia" in self.parts else {}
        handler = self.media.get(b"hdlr")
        self.is_video = handler is not None and data[handler.start + 8 :][:4] == b"vide"


def _chosen(data: bytes, movie: Box) -> _Trak:
    tracks = [_Trak(data, box) for box in _whole_boxes(data, movie) if box.kind == b"trak"]
    videos = [track for track in tracks if track.is_video]
    if not videos:
        raise damaged("it has no video track")
    return next((track for track in videos if track.enabled), videos[0])


def _refuse_references(data: bytes, parts: dict[bytes, Box]) -> None:
    """Refuse a track whose samples are in another file; `parts` are the boxes of its minf box."""
    information = children(data, parts[b"dinf"]) if b"dinf" in parts else {}
    if b"dref" in information:
        for entry in boxes(data, information[b"dref"], FULL + 4):
            if any(data[entry.start + FULL : entry.end]):
                raise InvalidVideo("the video refers to other files or addresses for its data")


def _timescale(data: bytes, box: Box) -> int:
    """Ticks per second in an mdhd or mvhd box."""
    scale = unsigned(data, box.start + (20 if data[box.start] == 1 else 12), 4)
    if scale == 0:
        raise damaged("its time scale is 0")
    return scale


def _rotation(data: bytes, track: Box | None, movie: Box | None) -> Rotation:
    """The rotation in the matrices of a tkhd and an mvhd box. Mirrors are ignored."""
    a, b, *_ = _matrix(data, track, 40)
    e, f, g, h = _matrix(data, movie, 36)
    return quarter_turns(math.degrees(math.atan2(a * f + b * h, a * e + b * g)))


def _matrix(data: bytes, box: Box | None, at: int) -> tuple[int, int, int, int]:
    """The upper left of a matrix in fixed point; `at` is where it stands in version 0."""
    if box is None:
        return 1 << 16, 0, 0, 1 << 16
    start = box.start + at + (12 if data[box.start] == 1 else 0)
    if start + 36 > box.end:
        return 1 << 16, 0, 0, 1 << 16
    a, b, _, c, d = struct.unpack_from(">iiiii", data, start)
    return a, b, c, d


def _edits(data: bytes, parts: dict[bytes, Box]) -> Iterator[Edit]:
    if b"edts" not in parts:
        return
    box = children(data, parts[b"edts"]).get(b"elst")
    if box is None:
        return
    entry = struct.Struct(">Qqi" if data[box.start] == 1 else ">Iii")
    (count,) = struct.unpack_from(">I", data, box.start + FULL)
    start = box.start + FULL + 4
    for index in range(min(count, _MAX_EDITS, (box.end - start) // entry.size)):
        duration, media_time, _ = entry.unpack_from(data, start + index * entry.size)
        yield Edit(duration, media_time)


# ---------------------------------------------------------------------- the codec


def _sample_entry(data: bytes, descriptions: Box) -> tuple[Codec, tuple[int, int], bytes]:
    """The codec, the size of a frame and the decoder's settings in an stsd box."""
    entries = list(islice(boxes(data, descriptions, FULL + 4), 2))
    if not entries:
        raise damaged("it describes no samples")
    entry = entries[0]
    found = _ENTRIES.get(entry.kind)
    if found is None:
        name = entry.kind.decode("ascii", "replace")
        shown = f" {name!r}" if name.isascii() and name.isprintable() else ""
        raise UnsupportedVideoFormat(f"the codec{shown} of the video is not supported ({CODECS})")
    if len(entries) > 1:
        raise UnsupportedVideoFormat("a video whose codec's settings change is not supported")
    if entry.end - entry.start < _ENTRY_FIELDS:
        raise damaged("its sample entry is too short")
    codec, kind = found
    width, height = struct.unpack_from(">HH", data, entry.start + 24)
    if not width or not height:
        raise damaged("its frames have no size")
    box = children(data, entry, _ENTRY_FIELDS).get(kind) if kind else None
    configuration = data[box.start : box.end] if box is not None else b""
    if kind == b"esds":
        configuration = _decoder_specific(configuration)
    return codec, (width, height), configuration


def _decoder_specific(contents: bytes) -> bytes:
    """The decoder's settings in an esds box (ISO/IEC 14496-1, 7.2.6).

    Raises:
        UnsupportedVideoFormat: the codec is not MPEG-4 part 2.
    """
    fields = Fields(contents, FULL)
    if fields.take(1) == 3:
        _length(fields)
        fields.at += 2
        flags = fields.take(1)
        fields.at += 2 if flags & 0x80 else 0
        fields.at += fields.take(1) if flags & 0x40 else 0
        fields.at += 2 if flags & 0x20 else 0
        kind = fields.take(1)
    else:
        kind = 0
    if kind != 4:
        raise damaged("its esds box has no settings")
    _length(fields)
    if fields.take(1) != _MPEG4_VISUAL:
        raise UnsupportedVideoFormat(f"the codec of the video is not supported ({CODECS})")
    fields.at += 12
    if fields.at >= len(contents) or fields.take(1) != 5:
        return b""
    length = _length(fields)
    return contents[fields.at : fields.at + length]


def _length(fields: Fields) -> int:
    """The length of a descriptor: up to four bytes with seven bits each."""
    value = 0
    for _ in range(4):
        byte = fields.take(1)
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return value
