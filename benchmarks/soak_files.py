"""The files of a soak: pictures, PDFs and clips, and an origin that serves them."""

import itertools
import random

import numpy as np

from benchmarks import photos
from tests import clips, hostile_pdfs, media
from tests.fuzz import media_mutations
from tests.hostile_origin import Behaviour, Visit

_SEED = 20261128


class Files:
    """Pictures, PDFs and clips, each one distinct; safe to use from several threads."""

    def __init__(self) -> None:
        self._serial = itertools.count()
        self._photos = {
            "small": [photos.photo(224, 224, seed) for seed in range(6)],
            "fullhd": [photos.photo(1920, 1080, seed) for seed in range(3)],
            "12mp": [photos.photo(4000, 3000, seed) for seed in range(2)],
        }
        self._pages = [photos.page(850, 1100, seed) for seed in range(3)]
        self._slow = [
            hostile_pdfs.SLOW[name]() for name in ("nested forms", "tiny tiles", "many shadings")
        ]

    def photo(self, rng: random.Random, size: str) -> bytes:
        mark = f"soak {next(self._serial):08} {rng.getrandbits(32):08x}"
        return photos.stamp(rng.choice(self._photos[size]), mark)

    def page(self, rng: random.Random) -> bytes:
        return photos.stamp(rng.choice(self._pages), f"soak {next(self._serial):08}")

    def pdf(self) -> bytes:
        width = 200 + next(self._serial) % 400
        return media.pdf((width, 300), (300, width))

    def gif(self) -> bytes:
        return media.gif(2 + next(self._serial) % 20)

    def clip(self, rng: random.Random) -> bytes:
        level = np.full((64, 64, 3), rng.randrange(256), np.uint8)
        return clips.of_frames([level] * 4, rng.choice((".mp4", ".mkv")))

    def hostile(self, rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            return rng.choice(self._slow)
        return media_mutations.mutated(_SEED, rng.randrange(10**9))


def behaviours(files: Files) -> dict[str, Behaviour]:
    """Routes of the origin that serve pictures: `/picture?size=NAME`, kept if `&kept=1`."""
    rng = random.Random(_SEED)

    async def picture(visit: Visit) -> None:
        kept = visit.query("kept") == "1"
        headers = ("Cache-Control: max-age=600",) if kept else ("Cache-Control: no-store",)
        await visit.respond("200 OK", files.photo(rng, visit.query("size", "small")), *headers)

    return {"/picture": picture}
