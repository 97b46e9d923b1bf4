"""InstructBLIP: BLIP-2 whose Q-Former also reads the instruction.

The features of an image depend on the prompt. So the instruction is an option of the processor,
which is part of the image's key, and the whole prompt is needed before an image can be processed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import InstructBlipConfig, InstructBlipQFormerModel
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.blip2 import (
    Blip2DummyInputsBuilder,
    Blip2ForConditionalGeneration,
    Blip2MultiModalProcessor,
    Blip2ProcessingInfo,
)
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from server.engine.models.pictures import together

_INSTRUCTION = "qformer_input_ids"


class InstructBlipProcessingInfo(Blip2ProcessingInfo):
    """One image, as in BLIP-2."""

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config(InstructBlipConfig)

    def instruction(self, prompt: list[int]) -> list[int]:
        """The tokens of the Q-Former for the text of `prompt`, cut to as many as it has positions
        for."""
        text = self.get_tokenizer().decode(prompt, skip_special_tokens=True)
        most = self.get_hf_config().qformer_config.max_position_embeddings
        processor: Any = self.get_hf_processor()
        tokens: list[int] = processor.qformer_tokenizer(text, truncation=True, max_length=most)[
            "input_ids"
        ]
        return tokens


class InstructBlipMultiModalProcessor(Blip2MultiModalProcessor):
    """`pixel_values` of an image are (3, height, width), and `qformer_input_ids` (tokens,)."""

    info: InstructBlipProcessingInfo

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        options = {
            **inputs.hf_processor_mm_kwargs,
            _INSTRUCTION: self.info.instruction(inputs.prompt),
        }
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        options: dict[str, Any] = dict(hf_kwargs)
        instruction = torch.tensor(options.pop(_INSTRUCTION, None) or self.info.instruction([]))
        outputs = super()._call_hf_processor(hf_data, options)
        outputs[_INSTRUCTION] = together(instruction for _ in outputs["pixel_values"])
        return outputs

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, _INSTRUCTION: MultiModalFieldConfig.batched("image")}


@MULTIMODAL_REGISTRY.register_processor(
    InstructBlipMultiModalProcessor,
    info=InstructBlipProcessingInfo,
    dummy_inputs=Blip2DummyInputsBuilder,
)
class InstructBlipForConditionalGeneration(Blip2ForConditionalGeneration):
    """vLLM's BLIP-2 with transformers' Q-Former, which takes text."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: Any = vllm_config.model_config.hf_config
        if not config.use_decoder_only_language_model:
            kind = config.text_config.model_type
            raise ValueError(f"InstructBLIP with the encoder-decoder model {kind} is not supported")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.qformer: Any = InstructBlipQFormerModel(config.qformer_config)

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """For each image, float (queries, hidden size)."""
        pixels, instructions = kwargs.get("pixel_values"), kwargs.get(_INSTRUCTION)
        if pixels is None or instructions is None:
            return []
        return [self._features(*each) for each in zip(pixels, instructions, strict=True)]

    def _features(self, pixels: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens
        found = self.qformer(
            input_ids=instruction[None],
            query_embeds=queries,
            encoder_hidden_states=self.vision_model(pixels[None]),
        )
        features: torch.Tensor = self.language_projection(found[0][:, : queries.shape[1]])
        return features[0]
