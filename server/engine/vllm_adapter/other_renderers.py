"""Renderers of models that have no Hugging Face tokenizer, with the image work handed to the pool.

`__getattr__` makes a class of each renderer of vLLM's when vLLM asks for it, so that only the one
that is used is imported.
"""

import functools
from collections.abc import Mapping
from typing import Any

from vllm.renderers import ChatParams
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.utils.import_utils import resolve_obj_by_qualname

from server.engine.vllm_adapter.conversation import unfit_messages, with_videos
from server.engine.vllm_adapter.renderer import MediaRenderer

_PREFIX = "Pooled"
# They take no pictures in messages, or are replaced elsewhere.
_LEFT = ("hf", "kimi_audio", "terratorch")

# What renderers of vLLM's have as their defaults for `media_io_kwargs["image"]`.
_IMAGE_IO: Mapping[str, Mapping[str, Any]] = {"KimiK3Renderer": {"image_mode": None}}
# Renderers whose tokenizers write the placeholders of pictures.
_WITH_PICTURES = ("MistralRenderer",)

_PICTURE_TYPES = ("image", "image_url", "input_image")
# A PNG of one pixel.
_STAND_IN = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+"
    "Av4N70a4AAAAAElFTkSuQmCC"
)


def install() -> None:
    """Register them in the place of vLLM's."""
    _classes.update(
        (_PREFIX + name, f"{module}.{name}")
        for mode, (module, name) in RENDERER_REGISTRY.renderers.items()
        if mode not in _LEFT and module != __name__
    )
    for mode, (_, name) in RENDERER_REGISTRY.renderers.items():
        if _PREFIX + name in _classes:
            RENDERER_REGISTRY.renderers[mode] = (__name__, _PREFIX + name)


_classes: dict[str, str] = {}


@functools.cache
def __getattr__(name: str) -> type:
    if name not in _classes:
        raise AttributeError(name)
    kind = resolve_obj_by_qualname(_classes[name])
    base = _StandInRenderer if kind.__name__ in _WITH_PICTURES else _GuardedRenderer
    return type(name, (base, kind), {"image_io": _IMAGE_IO.get(kind.__name__, {})})


class _GuardedRenderer(MediaRenderer):
    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """vLLM's.

        Raises:
            ClientError: vLLM or the chat template cannot read the messages.
        """
        with unfit_messages():
            return await super().render_messages_async(with_videos(messages), params)


class _StandInRenderer(_GuardedRenderer):
    """Its tokenizer decodes pictures, to learn how many tokens each takes. It gets one pixel in the
    place of each; `merging.py` puts the tokens of the picture there."""

    _apply_chat_template_async: Any

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._vllm_apply_chat_template_async = self._apply_chat_template_async
        self._apply_chat_template_async = self._with_stand_ins

    async def _with_stand_ins(self, tokenizer: Any, messages: Any, **options: Any) -> Any:
        seen = [{**message, "content": _stood_in(message.get("content"))} for message in messages]
        return await self._vllm_apply_chat_template_async(tokenizer, seen, **options)


def _stood_in(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {"type": "image_url", "image_url": {"url": _STAND_IN}}
        if isinstance(part, dict) and part.get("type") in _PICTURE_TYPES
        else part
        for part in content
    ]
