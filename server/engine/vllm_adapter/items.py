"""vLLM's items of pictures that workers have processed, from features in shared memory.

How features are divided into fields, and what goes into the prompt, follow from the size of the
picture, the options, the shapes of the features and their whole numbers (grids, counts). Working
that out takes about half a millisecond of the event loop, so it is remembered.
"""

import ctypes
import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cachetools
import msgspec
import torch
from vllm.multimodal.inputs import (
    BaseMultiModalField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)

from server.engine.vllm_adapter import processors
from server.engine.vllm_adapter.item_encoder import Element, encoded_field
from server.engine.vllm_adapter.levels import Modality, modality_of
from server.engine.vllm_adapter.processor_cache import PooledItem
from server.engine.vllm_adapter.processors import (
    DTYPES,
    Fields,
    Options,
    Processor,
    Updates,
    blank,
    tensor,
)
from server.workers.protocol import ArraySpec, Features, FeatureSpec, ListSpec

_REMEMBERED = 1024


class ItemMaker:
    """Makes items as `processors.item` does, and remembers the layouts of those that it has
    made."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._modality = modality_of(processor)
        self._known: cachetools.LRUCache[Hashable, _Layout]
        self._known = cachetools.LRUCache(_REMEMBERED)

    def item(
        self, features: Features, options: Options, options_id: bytes
    ) -> tuple[PooledItem, Updates]:
        """The item of one picture over the shared memory of `features`, and what it puts into the
        prompt. `options_id` stands for `options`."""
        size = features.size
        assert size is not None
        try:
            outlines = [
                (name, _outline(spec, features.buffer)) for name, spec in features.specs.items()
            ]
        except _TooLarge:
            arrays = features.arrays(tensor)
            item, updates = processors.item(self._processor, arrays, blank(size), options)
            return PooledItem(item), updates
        key = (size, options_id, *outlines)
        if (known := self._known.get(key)) is not None:
            return known.item(features), known.updates
        outputs = features.arrays(tensor)
        fields = processors.fields_of(self._processor, outputs, options)
        items = processors.divided(outputs, fields)
        updates = processors.updates_of(self._processor, blank(size), options, items)
        item = items[self._modality][0]
        self._known[key] = _Layout(self._modality, fields, updates, _shapes(outputs, item))
        return PooledItem(item), updates


class _Shape(NamedTuple):
    """Of an element that is one whole feature in another shape."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    field: BaseMultiModalField
    encoded_field: msgspec.Raw


_Shapes = Sequence[_Shape]


@dataclass(frozen=True)
class _Layout:
    """What items with equal outlines have in common. `shapes` is None unless each element is one
    whole feature in another shape."""

    modality: Modality
    fields: Fields
    updates: Updates
    shapes: _Shapes | None

    def item(self, features: Features) -> PooledItem:
        """The item of another picture."""
        if self.shapes is None:
            items = processors.divided(features.arrays(tensor), self.fields)
            return PooledItem(items[self.modality][0])
        memory, elements = memoryview(features.buffer), []
        for name, shape, nbytes, _, encoded in self.shapes:
            spec = features.specs[name]
            assert isinstance(spec, ArraySpec)
            window = memory[spec.offset : spec.offset + nbytes]
            elements.append(Element(name, spec.dtype, shape, window, encoded))
        return PooledItem.of(elements, functools.partial(self._tensors, features))

    def _tensors(self, features: Features) -> dict[str, MultiModalFieldElem]:
        made = {}
        for name, shape, _, field, _ in self.shapes or ():
            spec = features.specs[name]
            assert isinstance(spec, ArraySpec)
            data = tensor(spec.dtype, shape, features.buffer, spec.offset)
            made[name] = MultiModalFieldElem(data=data, field=field)
        return made


def _shapes(outputs: dict[str, object], item: MultiModalKwargsItem) -> _Shapes | None:
    """The `shapes` of a layout, from the first item and its features."""
    found = []
    for name, element in item.items():
        feature, data = outputs[name], element.data
        if not isinstance(feature, torch.Tensor) or not isinstance(data, torch.Tensor):
            return None
        is_whole = data.data_ptr() == feature.data_ptr() and data.numel() == feature.numel()
        if not is_whole or not data.is_contiguous():
            return None
        field = element.field
        found.append(_Shape(name, tuple(data.shape), data.nbytes, field, encoded_field(field)))
    return found


class _TooLarge(Exception):
    """A feature has more numbers than are worth comparing."""


_MOST_BYTES = 4096


def _outline(spec: FeatureSpec, buffer: ctypes.Array[ctypes.c_char]) -> Hashable:
    """Stands for a feature in a key: its type and shape, and all its numbers, but not those of
    large arrays of floating-point numbers or bytes, which are pixels.

    Raises:
        _TooLarge: it is another large array, such as a mask.
    """
    if isinstance(spec, ListSpec):
        return tuple(_outline(item, buffer) for item in spec.items)
    if not isinstance(spec, ArraySpec):
        return type(spec.value), spec.value
    dtype = DTYPES[spec.dtype]
    nbytes = math.prod(spec.shape) * dtype.itemsize
    if nbytes > _MOST_BYTES:
        if not dtype.is_floating_point and dtype != torch.uint8:
            raise _TooLarge
        return dtype, spec.shape
    return dtype, spec.shape, buffer[spec.offset : spec.offset + nbytes]
