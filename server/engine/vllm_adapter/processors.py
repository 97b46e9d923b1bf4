"""All that is private of vLLM's multimodal processors, and the types that they take and give.

A processor of vLLM makes features of media with a Hugging Face processor, and puts their
placeholders into the prompt. Its class is one of a model's family; what is used here is of
`BaseMultiModalProcessor`, and what a family may override is left to its class.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.processor import ResolvedPromptUpdate
from vllm.transformers_utils.repo_utils import get_non_weight_snapshot_path

from server.engine.vllm_adapter.levels import as_item, is_placed_by_tokenizer, modality_of
from server.imaging.sizing import Size

Processor = BaseMultiModalProcessor[Any]
Options = Mapping[str, Any]
Updates = Sequence[ResolvedPromptUpdate]
"""What an image puts into the prompt."""
Fields = Mapping[str, Any]
"""How vLLM divides the outputs of a processor among images, by name."""

# The files of a model besides its weights, and how many of them are looked at.
_CONFIGURATION = (".bpe", ".jinja", ".json", ".model", ".py", ".tiktoken", ".txt")
_MOST_FILES = 256

# ---------------------------------------------------------------------- one image


def processed(
    processor: Processor, image: Image.Image, options: Options, copies: int = 1
) -> tuple[BatchFeature, Mapping[str, Any]]:
    """What the Hugging Face processor makes of one picture under `options`
    (`mm_processor_kwargs`), and how vLLM divides it into fields, by name. `copies`: of the same
    picture so many times."""
    items = processor.info.parse_mm_data(_data(processor, image, copies))
    outputs = BatchFeature(dict(processor._apply_hf_processor_main(items, options)))
    return outputs, processor._get_mm_fields_config(outputs, options)


def video_processed(
    processor: Processor, frames: Any, metadata: Mapping[str, Any], options: Options
) -> tuple[BatchFeature, Mapping[str, Any]]:
    """What the Hugging Face processor makes of one video, uint8 (frames, height, width, 3), and how
    vLLM divides it into fields, by name."""
    items = processor.info.parse_mm_data({"video": [(frames, dict(metadata))]})
    outputs = BatchFeature(dict(processor._apply_hf_processor_main(items, options)))
    return outputs, processor._get_mm_fields_config(outputs, options)


def video_item(
    processor: Processor,
    outputs: Mapping[str, Any],
    frames: Any,
    metadata: Mapping[str, Any],
    options: Options,
) -> tuple[MultiModalKwargsItem, Updates]:
    """The features of one video as vLLM's item, and what they put into the prompt. `frames` may be
    `blank_frames`."""
    items = divided(outputs, fields_of(processor, outputs, options))
    sized = processor.info.parse_mm_data({"video": [(frames, dict(metadata))]}, validate=False)
    updates: Updates = processor._get_mm_prompt_updates(sized, options, items)["video"][0]
    return items["video"][0], updates


def configuration_files(config: ModelConfig) -> list[str]:
    """The files of the model, besides its weights, from which vLLM loads the processor."""
    folder = Path(get_non_weight_snapshot_path(config.model, revision=config.revision))
    if not folder.is_dir():
        return []
    found = (str(path) for path in folder.rglob("*") if path.suffix in _CONFIGURATION)
    return sorted(itertools.islice(found, _MOST_FILES))


def item(
    processor: Processor,
    outputs: Mapping[str, Any],
    image: Image.Image,
    options: Options,
    copies: int = 1,
) -> tuple[MultiModalKwargsItem, Updates]:
    """The features of one picture as vLLM's item, and what they put into the prompt. `outputs` are
    those of the Hugging Face processor, by name; `image` may be `blank`; `copies` as for
    `processed`, of which this is the first."""
    items = divided(outputs, fields_of(processor, outputs, options))
    updates = updates_of(processor, image, options, items, copies)
    return items[modality_of(processor)][0], updates


def fields_of(processor: Processor, outputs: Mapping[str, Any], options: Options) -> Fields:
    """How vLLM divides the outputs of the Hugging Face processor, by name."""
    fields: Fields = processor._get_mm_fields_config(BatchFeature(dict(outputs)), options)
    return fields


def divided(outputs: Mapping[str, Any], fields: Fields) -> MultiModalKwargsItems:
    """The outputs of the Hugging Face processor as vLLM's items."""
    items: MultiModalKwargsItems
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(dict(outputs)), fields)
    return items


def updates_of(
    processor: Processor,
    image: Image.Image,
    options: Options,
    items: MultiModalKwargsItems,
    copies: int = 1,
) -> Updates:
    """What one picture puts into the prompt. `items` has its features."""
    updates = _updates_of(processor, image, options, items, copies)
    if not is_placed_by_tokenizer(type(processor)):
        return updates
    return [replace(update, target=standing_for_a_picture(processor)) for update in updates]


def standing_for_a_picture(processor: Processor) -> list[int]:
    """The tokens of a picture of one pixel, for a model whose tokenizer writes the placeholders:
    where it gets such a picture, the tokens of the real one are put later."""
    return placeholder_of(processor, (1, 1))


def placeholder_of(processor: Processor, size: Size) -> list[int]:
    """The tokens of a picture whose features they do not depend on."""
    updates = _updates_of(processor, blank(size), {}, MultiModalKwargsItems(), 1)
    return list(updates[0].content.full)


def _updates_of(
    processor: Processor,
    image: Image.Image,
    options: Options,
    items: MultiModalKwargsItems,
    copies: int,
) -> Updates:
    sized = processor.info.parse_mm_data(_data(processor, image, copies), validate=False)
    found = processor._get_mm_prompt_updates(sized, options, items)
    updates: Updates = found[modality_of(processor)][0]
    return updates


def _data(processor: Processor, image: Image.Image, copies: int) -> Any:
    modality = modality_of(processor)
    return {modality: [as_item(modality, image)] * copies}


def qwen_video_pixels(info: Any, options: Options) -> dict[str, int]:
    """The fewest and the most pixels of a video: of each frame, or of all together."""
    merged = info._merge_and_resolve_mm_processor_kwargs(options).get("videos_kwargs", {})
    default = dict(info.get_hf_processor().video_processor.size)
    return dict(info._get_vision_size(merged, default_size=default))


def qwen_pixels(info: Any, options: Options) -> dict[str, int]:
    """The fewest ("shortest_edge") and the most ("longest_edge") pixels of a picture, for the
    Qwen-VL families."""
    merged = info._merge_and_resolve_mm_processor_kwargs(options).get("images_kwargs", {})
    default = dict(info.get_image_processor().size)
    return dict(info._get_vision_size(merged, default_size=default))


def llava_frame_tokens(info: Any) -> int:
    """The tokens of a frame of a video, for LLaVA-OneVision."""
    return int(info._get_num_frame_tokens(image_width=1, image_height=1))


# ---------------------------------------------------------------------- a prompt

# What vLLM's errors have in their texts where a prompt has too few placeholders, and where the
# Hugging Face processor has failed on the media; the latter shows all of them.
_TOO_FEW = ("prompt placeholders", "Failed to apply prompt")
_FAILED = "Failed to apply "


class PlaceholdersMissing(Exception):
    """A prompt has fewer placeholders than media: the chat template has dropped some."""


class ProcessorFailed(Exception):
    """The model's processor cannot process the media of a prompt."""


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `PlaceholdersMissing` and `ProcessorFailed` for vLLM's errors, which have no classes
    of their own."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if not any(text in str(error) for text in _TOO_FEW):
            raise
        raise PlaceholdersMissing from error
    except ValueError as error:
        if error.__cause__ is None or not str(error).startswith(_FAILED):
            raise
        raise ProcessorFailed from error


# ---------------------------------------------------------------------- types

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
"""By the names that workers use."""


def tensor(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> torch.Tensor:
    """A tensor over shared memory; it keeps `buffer` alive."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    flat = torch.frombuffer(buffer, dtype=DTYPES[dtype], count=count, offset=offset)
    return flat.view(shape)


def blank(size: Size) -> Image.Image:
    """A picture that has a size and no pixels: all that prompt updates ask for."""
    image = Image.Image()
    image._size = size
    image._mode = "RGB"
    return image


def blank_frames(frames: int, size: Size) -> npt.NDArray[np.uint8]:
    """Black frames that take no memory: uint8 (frames, height, width, 3)."""
    return np.broadcast_to(np.uint8(0), (frames, size[1], size[0], 3))
