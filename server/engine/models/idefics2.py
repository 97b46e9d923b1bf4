"""Idefics2: SigLIP at native resolution, a perceiver with 64 queries for each view, Mistral.

An image is one view, or five: its quarters and the whole (`do_image_splitting`). The prompt has
`<fake_token_around_image>` around the tokens of each view, once between neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from server.engine.models.pictures import ImageDummies, ImageInfo, SeparateImages

_AROUND = "<fake_token_around_image>"
# How a token begins that stands apart: a space or a line (SentencePiece, byte-level), or a tag.
_APART = "▁ĠĊ<"


class Idefics2ProcessingInfo(ImageInfo):
    """Tells this family's processors apart from those of others."""


class Idefics2MultiModalProcessor(SeparateImages):
    """`pixel_values` of an image are (views, 3, height, width), padded to its largest view, and
    `pixel_attention_mask` (views, height, width)."""

    outputs = ("pixel_values", "pixel_attention_mask")

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_id = self.info.get_hf_config().image_token_id
        latents = self.info.get_hf_config().perceiver_config.resampler_n_latents
        around = self._around()

        def replacement(index: int) -> PromptUpdateDetails:
            item: Any = out_mm_kwargs["image"][index]
            pixels = item["pixel_values"].data
            tokens = [around, *([image_id] * latents + [around]) * len(pixels)]
            return PromptUpdateDetails.select_token_id(tokens, image_id)

        return [PromptReplacement("image", target=[image_id], replacement=replacement)]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """A word that follows an image begins with a space, as in the Hugging Face processor."""
        tokenizer: Any = self.info.get_tokenizer()
        image_id = self.info.get_hf_config().image_token_id
        spaced: list[int] = []
        for before, token in zip([None, *prompt], prompt, strict=False):
            word = tokenizer.convert_ids_to_tokens(token) if before == image_id else ""
            if word and word[0] not in _APART:
                spaced += tokenizer.encode(" " + tokenizer.decode(token), add_special_tokens=False)
            else:
                spaced.append(token)
        return spaced

    def _around(self) -> int:
        return int(self.info.get_tokenizer().convert_tokens_to_ids(_AROUND))

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        """Neighbouring images share the token between them, as in the Hugging Face processor."""
        tokens, found = super()._apply_prompt_updates(token_ids, mm_prompt_updates)
        around, removed, end, images = self._around(), 0, -1, []
        for place in found.get("image", ()):
            start = place.start_idx - removed
            if start == end:
                del tokens[start]
                removed += 1
                mask: Any = place.is_embed
                place = replace(place, tokens=place.tokens[1:], is_embed=mask[1:])
            assert place.tokens[-1] == around
            place = replace(place, start_idx=start)
            images.append(place)
            end = start + place.length
        return tokens, {**found, "image": images} if images else found


@MULTIMODAL_REGISTRY.register_processor(
    Idefics2MultiModalProcessor, info=Idefics2ProcessingInfo, dummy_inputs=ImageDummies
)
class Idefics2ForConditionalGeneration(TransformersMultiModalForCausalLM):
    """transformers' model with vLLM's attention, by vLLM's transformers backend."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """For each image, float (views x 64, hidden size)."""
        pixels, masks = kwargs.get("pixel_values"), kwargs.get("pixel_attention_mask")
        if pixels is None or masks is None:
            return []
        return [self._features(*each) for each in zip(pixels, masks, strict=True)]

    def _features(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        found = model.get_image_features(
            pixels[None], pixel_attention_mask=mask[None].bool(), return_dict=True
        )
        features: torch.Tensor = found.pooler_output
        return features.flatten(0, 1)
