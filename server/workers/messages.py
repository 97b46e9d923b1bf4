"""What the pool and a worker say to each other, and how arrays lie in shared memory.

Both sides speak msgpack over a sequenced-packet socket; pictures and features never travel in a
message but in shared memory, described by `ArraySpec`. Nothing is pickled: a worker that a
hostile picture took over can return wrong numbers, not code.
"""

from typing import Any, TypeAlias

import msgspec

# A message must fit the socket's buffer (at least 208 KiB on Linux), so what may grow stays out.
MAX_MESSAGE_BYTES = 160 * 1024
# Encoded pictures up to this size travel inside the job's message.
INLINE_BYTES = 64 * 1024
MAX_OPTIONS_BYTES = 32 * 1024


class ArraySpec(msgspec.Struct, frozen=True, tag="array"):
    """An array in a shared segment: numpy-style dtype name, shape, offset in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ListSpec(msgspec.Struct, frozen=True, tag="list"):
    items: list["ArraySpec | ListSpec | ValueSpec"]


class ValueSpec(msgspec.Struct, frozen=True, tag="value"):
    """A plain number, text or None that needs no memory of its own."""

    value: int | float | bool | str | None


FeatureSpec: TypeAlias = ArraySpec | ListSpec | ValueSpec


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """First word of a worker: it can take jobs."""

    pid: int


class Job(msgspec.Struct, frozen=True, tag="job"):
    """One picture: `inline`, or the first `length` bytes of the input segment.

    `options` is a map in msgpack. `input_grown`: the message carries a new input segment as a
    file descriptor.
    `released`: result segments of this worker that nobody reads any more.
    """

    id: int
    options: msgspec.Raw
    inline: bytes | None
    length: int
    input_grown: bool
    released: list[int]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Features of job `id` in segment `segment` of `capacity` bytes.

    `is_new`: the message carries that segment as a file descriptor. `dropped`: segments the
    worker gave back to the system. `size`: the upright picture as the processor saw it,
    (width, height). Durations are in seconds.
    """

    id: int
    segment: int
    capacity: int
    is_new: bool
    dropped: list[int]
    features: dict[str, FeatureSpec]
    size: tuple[int, int]
    decode_s: float
    preprocess_s: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Job `id` has no result; `code` is one of `errors.WORKER_ERRORS`."""

    id: int
    code: str
    message: str


FromWorker: TypeAlias = Ready | Done | Failed

encoder = msgspec.msgpack.Encoder()
options_decoder: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(dict[str, Any])
job_decoder = msgspec.msgpack.Decoder(Job)
reply_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
