"""The workloads: the kinds of requests, their numbers, and their prebuilt bodies.

Every request is a file with the complete HTTP body, including base64. Both servers get the
same files; within a run a server gets each of them once. Pictures differ in content, as
`photos.stamp` makes them, and so do the questions, so that no cache of either server
hits, except in `12mp_repeat`, where this is the purpose.
"""

import base64
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks import photos, videos

MAX_TOKENS = 8
_SEED = 20240607
_HOT_PICTURES = 6
_HOT_VIDEOS = 2
# Frames per second with which a model that takes frames by time takes 8 of a video.
_VIDEO_FPS = 0.27
_VIDEO = "video/mp4"
_WARM_UPS = 6
_Ask = tuple[list[bytes], str]  # pictures and their media type


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request, or a mix of kinds."""

    name: str
    description: str
    requests: int  # in one round: 5 to 15 s on two cores
    kinds: tuple[str, ...] = ()  # the proportions of a mix


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests of one round."""

    bodies: list[Path]
    images: int

    def delete(self) -> None:
        """Remove the files, which are large."""
        for body in self.bodies:
            body.unlink()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("text", "no picture", 400),
        Workload("small", "one JPEG of 224x224", 400),
        Workload("fullhd", "one JPEG of 1920x1080", 120),
        Workload("12mp", "one JPEG of 4000x3000", 60),
        Workload("12mp_png", "one PNG of 4000x3000", 24),
        Workload("12mp_webp", "one WebP of 4000x3000", 40),
        Workload("12mp_repeat", "one JPEG of 4000x3000; 80% are from a hot set of six", 100),
        Workload("documents", "four PNG pages of 1275x1650", 48),
        Workload("video", "H.264 of 1920x1080, 30 s, 8 frames of which are shown", 12),
        Workload("video_phone", "the same as phones make it: a keyframe each second", 12),
        Workload("video_repeat", "as video; 80% are from a hot set of two", 24),
        Workload(
            "mixed",
            "text, small, fullhd, 12mp and 12mp_repeat 20% each, but documents 1 in 20",
            100,
            ("text", "small", "fullhd", "12mp", "12mp_repeat") * 4 + ("documents",),
        ),
    )
}


class Bodies:
    """Writes the bodies of one run; it never repeats a distinct picture or a question."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = model
        self._serial = itertools.count()
        self._random = random.Random(_SEED)
        self._bases = _Bases()
        self._ask: dict[str, Callable[[], _Ask]] = {
            "text": lambda: ([], ""),
            "small": partial(self._photos, 224, 224, 12),
            "fullhd": partial(self._photos, 1920, 1080, 6),
            "12mp": partial(self._photos, 4000, 3000, 4),
            "12mp_png": partial(self._photos, 4000, 3000, 2, "PNG"),
            "12mp_webp": partial(self._photos, 4000, 3000, 3, "WEBP"),
            "12mp_repeat": self._repeated_photo,
            "documents": self._pages,
            "video": self._video,
            "video_phone": partial(self._video, "phone"),
            "video_repeat": self._repeated_video,
        }

    def warm_up(self, workload: Workload) -> Batch:
        """Return a few requests of each kind, including every hot picture once."""
        kinds = sorted(set(workload.kinds or (workload.name,)))
        asks = [self._ask[kind]() for kind in kinds for _ in range(_WARM_UPS)]
        if "12mp_repeat" in kinds:
            asks += [([picture], "image/jpeg") for picture in self._hot]
        if "video_repeat" in kinds:
            asks += [([video], _VIDEO) for video in self._hot_videos]
        return self._write(asks)

    def round(self, workload: Workload, requests: int) -> Batch:
        """Return a round of new requests; a mix keeps its proportions in every round."""
        kinds = workload.kinds or (workload.name,)
        order = [kinds[index % len(kinds)] for index in range(requests)]
        self._random.shuffle(order)
        return self._write([self._ask[kind]() for kind in order])

    def _write(self, asks: list[_Ask]) -> Batch:
        paths = []
        for pictures, media_type in asks:
            serial = next(self._serial)
            paths.append(self._folder / f"{serial:06}.json")
            question = self._question(serial, words=12 if pictures else 80)
            paths[-1].write_bytes(_body(self._model, question, pictures, media_type))
        return Batch(paths, sum(len(pictures) for pictures, _ in asks))

    def _question(self, serial: int, words: int) -> str:
        return f"Request {serial}: {' '.join(self._random.choices(photos.WORDS, k=words))}?"

    def _photos(self, width: int, height: int, bases: int, kind: str = "JPEG") -> _Ask:
        base = self._bases.photo(width, height, self._random.randrange(bases), kind)
        return [photos.stamp(base, self._mark())], f"image/{kind.lower()}"

    def _pages(self) -> _Ask:
        pages = [self._bases.page(seed) for seed in self._random.sample(range(12), 4)]
        return [photos.stamp(page, self._mark()) for page in pages], "image/png"

    def _repeated_photo(self) -> _Ask:
        if self._random.random() < 0.8:
            return [self._random.choice(self._hot)], "image/jpeg"
        return self._photos(4000, 3000, 4)

    @cached_property
    def _hot(self) -> list[bytes]:
        return [self._photos(4000, 3000, 4)[0][0] for _ in range(_HOT_PICTURES)]

    def _video(self, kind: str = "usual") -> _Ask:
        clip = self._bases.clip(self._random.randrange(2), kind)
        return [videos.stamp(clip, self._mark())], _VIDEO

    def _repeated_video(self) -> _Ask:
        if self._random.random() < 0.8:
            return [self._random.choice(self._hot_videos)], _VIDEO
        return self._video()

    @cached_property
    def _hot_videos(self) -> list[bytes]:
        return [self._video()[0][0] for _ in range(_HOT_VIDEOS)]

    def _mark(self) -> str:
        return f"benchmark picture {self._random.getrandbits(64):016x}"


class _Bases:
    """The base pictures, each drawn at first use."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[int | str, ...], bytes] = {}

    def photo(self, width: int, height: int, seed: int, kind: str) -> bytes:
        key = (width, height, seed, kind)
        if key not in self._drawn:
            self._drawn[key] = photos.photo(width, height, seed, 88 + seed % 3, kind)
        return self._drawn[key]

    def clip(self, seed: int, kind: str) -> bytes:
        if (key := (kind, seed)) not in self._drawn:
            self._drawn[key] = videos.clip(seed, kind)
        return self._drawn[key]

    def page(self, seed: int) -> bytes:
        if (seed,) not in self._drawn:
            self._drawn[seed,] = photos.page(1275, 1650, seed)
        return self._drawn[seed,]


def _body(model: str, question: str, pictures: list[bytes], media_type: str) -> bytes:
    """Return the JSON of a streamed request; `ignore_eos` makes all answers of equal length."""
    kind = "video_url" if media_type == _VIDEO else "image_url"
    content: list[dict[str, object]] = [
        {"type": kind, kind: {"url": _data_url(picture, media_type)}} for picture in pictures
    ]
    content.append({"type": "text", "text": question})
    request: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if kind == "video_url":
        request["media_io_kwargs"] = {"video": {"fps": _VIDEO_FPS}}
    return json.dumps(request).encode()


def _data_url(picture: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(picture).decode()}"
