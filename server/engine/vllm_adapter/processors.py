"""All that is private of vLLM's multimodal processors, and the types that they take and give.

A processor of vLLM makes features of media with a Hugging Face processor, and puts their
placeholders into the prompt. Its class is one of a model's family; what is used here is of
`BaseMultiModalProcessor`, and what a family may override is left to its class.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.processing import BaseMultiModalProcessor, EncDecMultiModalProcessor
from vllm.multimodal.processing.processor import ResolvedPromptUpdate
from vllm.transformers_utils.repo_utils import get_non_weight_snapshot_path

from server.imaging.sizing import Size
from server.request import context as requests
from server.request.groups import prefixed

Processor = BaseMultiModalProcessor[Any]
Options = Mapping[str, Any]
Updates = Sequence[ResolvedPromptUpdate]
"""What an image puts into the prompt."""
Fields = Mapping[str, Any]
"""How vLLM divides the outputs of a processor among images, by name."""

# A processor that overrides one of these does more than look at one image at a time.
_WHOLE_PROMPT_METHODS = (
    "apply",
    "_apply_hf_processor",
    "_cached_apply_hf_processor",
    "_merge_mm_kwargs",
    "_maybe_apply_prompt_updates",
)

# The files of a model besides its weights, and how many of them are looked at.
_CONFIGURATION = (".bpe", ".jinja", ".json", ".model", ".py", ".tiktoken", ".txt")
_MOST_FILES = 256

# ---------------------------------------------------------------------- one image


def is_image_by_image(processor: Processor | None) -> bool:
    """Whether `processor` treats each image of a prompt for itself, as vLLM's base class does."""
    if processor is None or isinstance(processor, EncDecMultiModalProcessor):
        return False
    return all(
        getattr(type(processor), name) is getattr(BaseMultiModalProcessor, name)
        for name in _WHOLE_PROMPT_METHODS
    )


def processed(
    processor: Processor, image: Image.Image, options: Options
) -> tuple[BatchFeature, Mapping[str, Any]]:
    """What the Hugging Face processor makes of one picture under `options`
    (`mm_processor_kwargs`), and how vLLM divides it into fields, by name."""
    items = processor.info.parse_mm_data({"image": [image]})
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
    processor: Processor, outputs: Mapping[str, Any], image: Image.Image, options: Options
) -> tuple[MultiModalKwargsItem, Updates]:
    """The features of one picture as vLLM's item, and what they put into the prompt. `outputs` are
    those of the Hugging Face processor, by name; `image` may be `blank`."""
    items = divided(outputs, fields_of(processor, outputs, options))
    return items["image"][0], updates_of(processor, image, options, items)


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
    processor: Processor, image: Image.Image, options: Options, items: MultiModalKwargsItems
) -> Updates:
    """What one picture puts into the prompt. `items` has its features."""
    sized = processor.info.parse_mm_data({"image": [image]}, validate=False)
    updates: Updates = processor._get_mm_prompt_updates(sized, options, items)["image"][0]
    return updates


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


# ---------------------------------------------------------------------- of a renderer


def keep_groups_apart(renderer: Any) -> None:
    """Let vLLM's `renderer` name items by the group of the current request, also in its thread."""
    if renderer.mm_processor is not None:
        name_by_group(renderer.mm_processor)
        carry_context(renderer._mm_executor)


def name_by_group(processor: Any) -> None:
    """Let the names that vLLM's `processor` gives to items be those of the group of API keys that
    the current request belongs to (see `send.keep_in_group`)."""
    hashes_of = processor._get_mm_hashes

    def named(inputs: Any) -> dict[str, list[str]]:
        hashes, group = hashes_of(inputs), requests.current().group
        return {kind: [prefixed(name, group) for name in names] for kind, names in hashes.items()}

    processor._get_mm_hashes = named


def carry_context(executor: Executor) -> None:
    """Let what is submitted to `executor` run in the context of its caller."""
    submit: Any = executor.submit

    def submit_in_context(work: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(contextvars.copy_context().run, work, *args, **kwargs)

    executor.submit = submit_in_context  # type: ignore[method-assign]
