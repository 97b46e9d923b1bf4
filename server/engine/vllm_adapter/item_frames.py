"""Encodes requests for engines in other processes, and tells the features of items apart, so that
a transport need not send those twice that the front has kept."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.serial_utils import MsgpackEncoder

_KEPT = "saccade_kept"


class Repeats(NamedTuple):
    """Patches that may have one frame several times, as those of pictures do where the encoder
    takes `frames` frames of a video at a time. Each is `nbytes` long."""

    frames: int
    nbytes: int


@dataclass(frozen=True)
class Features:
    """The features of one item, as consecutive buffers of a message.

    Attributes:
        kept: what a transport keeps of them. It is the same object for as long as the front has the
            features in its cache.
        repeats: how bytes in them may be repeated.
    """

    buffers: list[Any]
    repeats: Repeats | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


class ItemFrames(MsgpackEncoder):
    """vLLM's encoder, whose messages have `Features` in the place of the buffers of an item."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._repeats = _repeats(config)
        self._items: list[tuple[MultiModalKwargsItem, int, int]] = []

    def frames(self, message: Any) -> list[Any]:
        """The message as buffers and `Features`."""
        self._items.clear()
        buffers = list(self.encode(message))
        frames, end = [], 0
        for item, start, stop in self._items:
            kept = vars(item).setdefault(_KEPT, {})
            frames += [*buffers[end:start], Features(buffers[start:stop], self._repeats, kept)]
            end = stop
        self._items.clear()
        return [*frames, *buffers[end:]]

    def _encode_mm_item(self, item: MultiModalKwargsItem) -> dict[str, Any]:
        assert self.aux_buffers is not None
        start = len(self.aux_buffers)
        encoded = super()._encode_mm_item(item)
        if len(self.aux_buffers) > start:
            self._items.append((item, start, len(self.aux_buffers)))
        return encoded


def _repeats(config: ModelConfig) -> Repeats | None:
    whole: Any = config.hf_config
    vision = getattr(whole, "vision_config", None)
    frames = getattr(vision, "temporal_patch_size", None)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(frames, int) or not isinstance(patch, int) or frames < 2:
        return None
    return Repeats(frames, patch * patch)
