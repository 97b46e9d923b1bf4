"""Features of images on their way from a front to an engine, in Ray's object store.

Those that the front has kept are put there once, and requests about them carry a reference. Readers
on one node map the same memory; another node copies them when it needs them first. Of patches that
have the same frame several times, one travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cachetools
import numpy as np
import numpy.typing as npt
import ray

from server.concurrency import in_thread
from server.engine.vllm_adapter.item_frames import Features, Repeats
from server.telemetry import metrics

# Ray passes smaller arguments without its store.
_LEAST_BYTES = 100_000
# The share of a node's store that kept features may fill, of all fronts together.
_SHARE_OF_STORE = 1 / 4
_STORED = "stored"
# Patches that are compared before all the others.
_FEW = 64

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Stored:
    """Features in the store.

    Attributes:
        reference: of a list of arrays.
        nbytes: what these take.
        repeats: how those that were folded are unfolded; None if there are none.
        folded: which of them were.
    """

    reference: Any
    nbytes: int
    repeats: Repeats | None
    folded: Sequence[bool]


class _References(cachetools.LRUCache[int, dict[str, Any]]):
    """What is kept of features, by identity; what is pushed out frees its place in the store."""

    def popitem(self) -> tuple[int, dict[str, Any]]:
        key, kept = super().popitem()
        kept.clear()
        return key, kept


class Sender:
    """The front's side. `most_bytes`: how much kept features may take of the store."""

    def __init__(self, most_bytes: int) -> None:
        self._kept = _References(most_bytes, getsizeof=lambda kept: kept[_STORED].nbytes)

    async def arguments(self, frames: Sequence[Any]) -> list[Any]:
        """Frames of a message as arguments of a call: arrays, and `Stored` for large features."""
        found: list[Any] = []
        for frame in frames:
            if not isinstance(frame, Features):
                found.append(_array(frame))
            elif frame.nbytes < _LEAST_BYTES:
                found += map(_array, frame.buffers)
            else:
                found.append(await self._stored(frame))
        return found

    async def _stored(self, features: Features) -> Stored:
        known: Stored | None = features.kept.get(_STORED)
        if known is not None:
            self._kept.get(id(features.kept))  # was used last
            metrics.features_to_engines.labels("reused").inc(known.nbytes)
            return known
        stored = await in_thread(_put, features)
        metrics.features_to_engines.labels("stored").inc(stored.nbytes)
        if stored.nbytes <= self._kept.maxsize:
            features.kept[_STORED] = stored
            self._kept[id(features.kept)] = features.kept
        return stored


async def received(arguments: Sequence[Any]) -> list[Any]:
    """The engine's side: the frames that were sent, as buffers.

    Raises:
        ray.exceptions.RayError: features are lost, since their front or its node has ended.
    """
    frames: list[Any] = []
    for argument in arguments:
        if not isinstance(argument, Stored):
            frames.append(argument)
            continue
        arrays = await argument.reference
        if argument.repeats is not None:
            arrays = await in_thread(_unfolded, arrays, argument.repeats, argument.folded)
        frames += arrays
    return frames


def store_share(fronts: int) -> int:
    """How many bytes of this node's store the features of one front may take."""
    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    node = ray.get_runtime_context().get_node_id()
    resources = next(each["Resources"] for each in nodes if each["NodeID"] == node)
    return int(resources["object_store_memory"] * _SHARE_OF_STORE / fronts)


def _put(features: Features) -> Stored:
    arrays, folded = [], []
    for buffer in features.buffers:
        array = _array(buffer)
        once = fold(array, features.repeats) if features.repeats is not None else None
        folded.append(once is not None)
        arrays.append(array if once is None else once)
    nbytes = sum(array.nbytes for array in arrays)
    repeats = features.repeats if any(folded) else None
    return Stored(ray.put(arrays), nbytes, repeats, tuple(folded))


def _unfolded(arrays: list[Bytes], repeats: Repeats, folded: Sequence[bool]) -> list[Bytes]:
    pairs = zip(arrays, folded, strict=True)
    return [unfold(array, repeats) if was_folded else array for array, was_folded in pairs]


def fold(array: Bytes, repeats: Repeats) -> Bytes | None:
    """The first frame of each patch of uint8 (bytes,); None if the others differ from it."""
    whole = repeats.frames * repeats.nbytes
    if array.nbytes < whole or array.nbytes % whole:
        return None
    word = next(size for size in (8, 4, 2, 1) if repeats.nbytes % size == 0)
    patches = array.view(f"u{word}").reshape(-1, repeats.frames, repeats.nbytes // word)
    first = patches[:, 0]
    for other in range(1, repeats.frames):
        # Of a video, the beginning tells.
        for some in (slice(0, _FEW), slice(_FEW, None)):
            if not np.array_equal(first[some], patches[some, other]):
                return None
    return np.ascontiguousarray(first).reshape(-1).view(np.uint8)


def unfold(array: Bytes, repeats: Repeats) -> Bytes:
    """The array that was folded."""
    first = array.reshape(-1, 1, repeats.nbytes)
    return np.repeat(first, repeats.frames, axis=1).reshape(-1)


def _array(buffer: Any) -> Bytes:
    return np.frombuffer(buffer, np.uint8)
