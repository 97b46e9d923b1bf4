"""What a worker computed for one picture, as arrays that lie in shared memory."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.imaging.sizing import Size
from server.workers.protocol import ArraySpec, Done, FeatureSpec, ListSpec, ValueSpec

# Turns (dtype name, shape, buffer, offset in bytes) into the consumer's kind of array. The array
# must keep `buffer` alive: the memory is used again when `buffer` goes.
MakeArray = Callable[[str, tuple[int, ...], Any, int], Any]


@dataclass(frozen=True)
class Features:
    """The processor's output for one picture.

    `buffer` is a ctypes array over shared memory; its end gives the memory back to the worker.
    `size` is the upright picture as the processor saw it: (width, height) in pixels; None if the
    file was only inspected.
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
        """Every feature by its name, without a copy."""
        return {name: self._build(spec, make) for name, spec in self.specs.items()}

    def _build(self, spec: FeatureSpec, make: MakeArray) -> Any:
        if isinstance(spec, ArraySpec):
            return make(spec.dtype, spec.shape, self.buffer, spec.offset)
        if isinstance(spec, ListSpec):
            return [self._build(item, make) for item in spec.items]
        assert isinstance(spec, ValueSpec)
        return spec.value
