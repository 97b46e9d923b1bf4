"""Puts images and videos that were processed one by one into their prompt.

Most families replace one run of tokens for each image, always the same one. This is done here in a
few steps. vLLM's planner, which does the rest, also knows alternatives, insertions, several
modalities and targets that are text.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.inputs import MultiModalInput, mm_input
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.processor import MultiModalProcessingResult, UpdateMode

from server.engine.vllm_adapter.levels import is_placed_by_tokenizer
from server.engine.vllm_adapter.processors import Processor, Updates

Items = Sequence[tuple[MultiModalKwargsItem | None, Updates]]
"""The features of each item, if they are to be sent, and what it puts into the prompt."""
Media = Mapping[str, Items]
"""Items by their modality: "image", "video"."""

# What vLLM's planner calls. A family that overrides one of these keeps the planner.
_PLANNED = (
    "_apply_prompt_updates",
    "_apply_token_matches_with_placeholders",
    "_maybe_apply_prompt_updates",
    "_recompute_cached_prompt_update",
    "_validate_mm_kwargs",
    "_validate_mm_placeholders",
    "_validate_mm_updates",
)


def merged(
    processor: Processor, prompt: list[int], keys: Mapping[str, list[str]], media: Media
) -> MultiModalInput:
    """What the engine gets of a prompt. `keys` and `media` are those of its images and videos, in
    order."""
    tokens = processor._postprocess_prompt(prompt)
    kind = type(processor)
    plain = _is_plain(kind) or is_placed_by_tokenizer(kind)
    placed = replaced(tokens, media) if plain else None
    tokens, placeholders = planned(processor, tokens, keys, media) if placed is None else placed
    return mm_input(
        prompt_token_ids=tokens,
        mm_kwargs=_kwargs(media),
        mm_hashes=dict(keys),
        mm_placeholders=placeholders,
    )


@functools.cache
def _is_plain(kind: type) -> bool:
    return all(getattr(kind, name) is getattr(BaseMultiModalProcessor, name) for name in _PLANNED)


def _kwargs(media: Media) -> MultiModalKwargsItems:
    kwargs: Any = {modality: [each for each, _ in items] for modality, items in media.items()}
    return MultiModalKwargsItems(kwargs)


def replaced(
    prompt: list[int], media: Media
) -> tuple[list[int], dict[str, list[PlaceholderRange]]] | None:
    """The tokens with images, and where these are; None unless each image replaces the same tokens,
    and the prompt has them for each. The same for videos, but not for both."""
    if len(media) != 1:
        return None
    ((modality, items),) = media.items()
    target = items[0][1][0].target if items and items[0][1] else None
    if not isinstance(target, list):
        return None
    tokens: list[int] = []
    ranges = []
    end, matches = 0, _matches(prompt, target)
    for _, updates in items:
        if len(updates) != 1 or updates[0].mode is not UpdateMode.REPLACE:
            return None
        content = updates[0].content
        start = next(matches, None)
        if start is None or not content.full or updates[0].target != target:
            return None
        tokens += prompt[end:start]
        is_embed = None if content.is_embed is None else content.is_embed(content.full)
        ranges.append(PlaceholderRange(len(tokens), len(content.full), is_embed))
        tokens += content.full
        end = start + len(target)
    tokens += prompt[end:]
    return tokens, {modality: ranges}


def _matches(prompt: list[int], target: list[int]) -> Iterator[int]:
    """Where `target` begins in `prompt`, from left to right, without overlaps."""
    start = 0
    while target:
        try:
            start = prompt.index(target[0], start)
        except ValueError:
            return
        if prompt[start : start + len(target)] == target:
            yield start
            start += len(target)
        else:
            start += 1


def planned(
    processor: Processor, prompt: list[int], keys: Mapping[str, list[str]], media: Media
) -> tuple[list[int], dict[str, list[PlaceholderRange]]]:
    """The same, by vLLM's planner."""
    updates = {
        modality: [
            [processor._recompute_cached_prompt_update(update, index) for update in item_updates]
            for index, (_, item_updates) in enumerate(items)
        ]
        for modality, items in media.items()
    }
    result = MultiModalProcessingResult(
        prompt_ids=prompt,
        kwargs=_kwargs(media),
        hashes=dict(keys),
        prompt_updates=updates,
    )
    count = {modality: len(items) for modality, items in media.items()}
    counts: Any = SimpleNamespace(get_all_counts=lambda: count)
    tokens, placeholders = processor._maybe_apply_prompt_updates(counts, result)
    return tokens, {
        modality: [found.to_range() for found in ranges]
        for modality, ranges in placeholders.items()
    }
