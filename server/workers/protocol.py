"""Messages between the pool and a worker, and the description of arrays in shared memory.

Both sides send msgpack over a sequenced-packet socket. Large pictures and all features travel in
shared memory; a message describes the features by `ArraySpec`. Nothing is pickled, so a compromised
worker can return wrong numbers but cannot inject code.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec

from server.imaging.sizing import Size
from server.workers.confinement import Confinement
from server.workers.jobs import Job

# A message must fit the socket's buffer (at least 208 KiB on Linux), so it has no unbounded part.
MAX_MESSAGE_BYTES = 160 * 1024
# Several jobs travel in one message up to this size, and one of any size.
JOBS_BYTES = 64 * 1024
# Encoded pictures up to this size travel inside the request's message.
INLINE_BYTES = 64 * 1024


class ArraySpec(msgspec.Struct, frozen=True, tag="array"):
    """An array in a shared segment: numpy-style dtype name, shape, offset in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ListSpec(msgspec.Struct, frozen=True, tag="list"):
    items: list["ArraySpec | ListSpec | ValueSpec"]


class ValueSpec(msgspec.Struct, frozen=True, tag="value"):
    """A plain number, text or None that needs no shared memory."""

    value: int | float | bool | str | None


FeatureSpec: TypeAlias = ArraySpec | ListSpec | ValueSpec


class WorkRequest(msgspec.Struct, frozen=True):
    """Jobs on one file: `inline`, or the first `length` bytes of the input segment.

    `jobs` are encoded `Job`s, which get one reply each, in their order; their ids count from `id`.
    Several are for ascending frames of an animation. `input_grown`: the message carries a new input
    segment as a file descriptor. `released`: result segments of this worker that are no longer
    read.
    """

    id: int
    jobs: list[msgspec.Raw]
    inline: bytes | None
    length: int
    input_grown: bool
    released: list[int]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first message of a worker, which can now take jobs, unless its `confinement` does not
    suffice. It has not seen a file yet, so it can be trusted."""

    confinement: Confinement = Confinement()


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    """The picture of job `id` is decoded, and the processor begins: at most once before the reply,
    and only if decoding took long."""

    id: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Features of job `id` in segment `segment` of `capacity` bytes.

    `is_new`: the message carries that segment as a file descriptor. `dropped`: segments that the
    worker has freed. `size`: the upright (width, height) in pixels that the processor saw;
    None if the file was only inspected. Durations are in seconds.
    """

    id: int
    segment: int
    capacity: int
    is_new: bool
    dropped: list[int]
    features: dict[str, FeatureSpec]
    size: Size | None
    decode_s: float
    preprocess_s: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Job `id` failed; `code` is one of `errors.WORKER_ERRORS`. `ends`: the worker exits, because
    it cannot stop the job in another way."""

    id: int
    code: str
    message: str
    ends: bool = False


FromWorker: TypeAlias = Ready | Decoded | Done | Failed

encoder = msgspec.msgpack.Encoder()
request_decoder = msgspec.msgpack.Decoder(WorkRequest)
job_decoder: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
reply_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


# ---------------------------------------------------------------------- the result

# Makes the consumer's type of array from (dtype name, shape, buffer, offset in bytes). The array
# must keep `buffer` alive: the worker reuses the memory once `buffer` is freed.
MakeArray = Callable[[str, tuple[int, ...], Any, int], Any]


class Features(msgspec.Struct, frozen=True):
    """The processor's output for one picture.

    `buffer` is a ctypes array over shared memory, which the worker reuses once `buffer` is freed.
    `size` is the upright (width, height) in pixels that the processor saw; None if the file was
    only inspected. Durations are in seconds.
    """

    specs: Mapping[str, FeatureSpec]
    buffer: ctypes.Array[ctypes.c_char]
    size: Size | None
    decode_s: float
    preprocess_s: float

    @classmethod
    def of(cls, reply: Done, buffer: ctypes.Array[ctypes.c_char]) -> "Features":
        return cls(reply.features, buffer, reply.size, reply.decode_s, reply.preprocess_s)

    def arrays(self, make: MakeArray) -> dict[str, Any]:
        """The features by name, as arrays over the shared memory."""
        return {name: self._build(spec, make) for name, spec in self.specs.items()}

    def _build(self, spec: FeatureSpec, make: MakeArray) -> Any:
        if isinstance(spec, ArraySpec):
            return make(spec.dtype, spec.shape, self.buffer, spec.offset)
        if isinstance(spec, ListSpec):
            return [self._build(item, make) for item in spec.items]
        assert isinstance(spec, ValueSpec)
        return spec.value
