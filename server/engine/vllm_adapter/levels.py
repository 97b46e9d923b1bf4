"""How much of the work on a picture the image workers can do for a model: its level.

Read from vLLM's classes alone, so that it is known without a checkpoint. What the server finds at
start-up, where it compares both ways on a test picture, can only lower it.
"""

from typing import Any, Literal

from vllm.multimodal.processing import BaseMultiModalProcessor, EncDecMultiModalProcessor

Level = Literal["pooled", "decoded"]
Modality = Literal["image", "vision_chunk"]

# A processor that overrides one of these does more than look at one picture at a time.
_WHOLE_PROMPT_METHODS = (
    "apply",
    "_apply_hf_processor",
    "_cached_apply_hf_processor",
    "_merge_mm_kwargs",
)
# Processors whose overrides treat pictures in another way only if a prompt has more than so many.
_FEW_IMAGES = {
    "DeepseekVL2MultiModalProcessor": 2,
    "H2OVLMultiModalProcessor": 1,
    "UnlimitedOCRMultiModalProcessor": 1,
}
# Processors whose placeholders are put into the prompt by the tokenizer, which sees the pictures.
_PLACED_BY_TOKENIZER = ("PixtralMultiModalProcessor",)


def level(kind: type) -> Level:
    """The level of a model whose processor's class is `kind`: "pooled", workers decode and
    preprocess; "decoded", they decode, and vLLM preprocesses."""
    return "decoded" if images_apart(kind) == 0 else "pooled"


def images_apart(kind: type) -> int | None:
    """How many pictures a prompt may have for each to be treated for itself; None: any number."""
    if issubclass(kind, EncDecMultiModalProcessor):
        return 0
    if any(_overrides(kind, name) for name in _WHOLE_PROMPT_METHODS):
        return _FEW_IMAGES.get(kind.__name__, 0)
    return None


def is_placed_by_tokenizer(kind: type) -> bool:
    """Whether the tokenizer, which would decode each picture for that, writes the placeholders."""
    return kind.__name__ in _PLACED_BY_TOKENIZER


def modality_of(processor: BaseMultiModalProcessor[Any]) -> Modality:
    """What the processor calls a picture: some have one modality for pictures and videos."""
    return "vision_chunk" if "vision_chunk" in processor.info.supported_mm_limits else "image"


def takes_images(processor: BaseMultiModalProcessor[Any] | None) -> bool:
    """Whether the model takes pictures at all: others take only audio."""
    return processor is not None and modality_of(processor) in processor.info.supported_mm_limits


def as_item(modality: Modality, picture: Any) -> Any:
    """What vLLM takes for one picture; None stands for one that is only named."""
    if modality == "image" or picture is None:
        return picture
    return {"type": "image", "image": picture, "uuid": None}


def pictures_of(modality: Modality, items: Any) -> Any:
    """The pictures of what vLLM collected for `modality`. Other items, such as chunks of videos,
    are returned as they are."""
    if modality == "image" or not isinstance(items, list):
        return items
    return [
        item["image"] if isinstance(item, dict) and item.get("type") == "image" else item
        for item in items
    ]


def _overrides(kind: type, name: str) -> bool:
    return getattr(kind, name) is not getattr(BaseMultiModalProcessor, name)
