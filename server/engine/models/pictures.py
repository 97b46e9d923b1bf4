"""What the processors of this package have in common: each image is processed by itself."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
)


class ImageInfo(BaseProcessingInfo):
    """A model that takes any number of images, and nothing else."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class ImageDummies(BaseDummyInputsBuilder[ImageInfo]):
    """Images of the largest size that the image processor lets through."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "<image>" * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size: Any = self.info.get_hf_processor().image_processor.size
        height, width = size.get("height"), size.get("width")
        edge = size.get("longest_edge") or size.get("shortest_edge")
        images = self._get_dummy_images(
            width=width or edge,
            height=height or edge,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class SeparateImages(BaseMultiModalProcessor[ImageInfo]):
    """Calls the Hugging Face processor for each image by itself, so that features depend on no
    other image of the request."""

    outputs: tuple[str, ...] = ("pixel_values",)
    """Which outputs of the Hugging Face processor the model takes. The first dimension of each
    counts images."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        images: Any = hf_data["images"]
        process, text = super()._call_hf_processor, self._text_of_one()
        words = {} if text is None else {"text": text}
        each = [process({**words, "images": [image]}, hf_kwargs) for image in images]
        names = self.outputs
        return BatchFeature({name: together(one[name][0] for one in each) for name in names})

    def _text_of_one(self) -> str | None:
        return self.dummy_inputs.get_dummy_text({"image": 1})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("image") for name in self.outputs}


def together(tensors: Iterable[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor, if all have the same shape."""
    each = list(tensors)
    return torch.stack(each) if len({tensor.shape for tensor in each}) == 1 else each
