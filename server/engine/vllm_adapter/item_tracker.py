"""Collects the media of a conversation, as vLLM does, without what is the same for each one."""

from typing import Any

from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.renderers import chat_utils

from server.concurrency import all_or_none


def install(renderer: Any) -> None:
    """Let vLLM collect media with a tracker that is made for the model of its `renderer`."""

    class ItemTracker(chat_utils.AsyncMultiModalItemTracker):
        # vLLM looks both up for each conversation, which takes longer than to use them.
        model_cls: Any = get_model_cls(renderer.model_config)
        mm_processor: Any = renderer.get_mm_processor()

        async def resolve_items(self) -> Any:
            """vLLM's, without a task for a single item, which is loaded by now."""
            groups = self._items_by_modality
            if not groups:
                return None, None
            items = iter(await all_or_none(item() for group in groups.values() for item in group))
            resolved = {kind: [next(items) for _ in group] for kind, group in groups.items()}
            return chat_utils._resolve_items(resolved, self.mm_processor, self._modality_order)

    trackers: Any = chat_utils
    trackers.AsyncMultiModalItemTracker = ItemTracker
