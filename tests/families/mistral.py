"""Pixtral and Mistral 3, in the Hugging Face format."""

from pathlib import Path
from typing import Any

from tests.families.parts import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    Maker,
    language_model,
    save_config,
    save_image_processor,
    save_json,
    save_tokenizer,
    vision_tower,
)


def _pixtral(directory: Path) -> None:
    """Any size in steps of 16 pixels, the longer edge up to 256."""
    _pixtral_like(
        directory,
        "llava",
        patch=16,
        merge=1,
        longest_edge=256,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _mistral3(directory: Path) -> None:
    """Any size in steps of 28 pixels, the longer edge up to 400, which is not a multiple of 28."""
    _pixtral_like(directory, "mistral3", patch=14, merge=2, longest_edge=400, spatial_merge_size=2)


def _pixtral_like(
    directory: Path, model_type: str, *, patch: int, merge: int, longest_edge: int, **settings: Any
) -> None:
    markers = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary = save_tokenizer(directory, image="[IMG]", special=markers)
    vision = vision_tower(longest_edge, patch, model_type="pixtral", head_dim=32)
    save_config(
        directory,
        model_type,
        text_config=language_model(vocabulary, model_type="mistral"),
        vision_config=vision,
        image_token_index=vocabulary["[IMG]"],
        **settings,
    )
    save_image_processor(
        directory,
        "PixtralImageProcessorFast",
        "PixtralProcessor",
        size={"longest_edge": longest_edge},
        patch_size={"height": patch, "width": patch},
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="PixtralProcessor",
        patch_size=patch,
        spatial_merge_size=merge,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )


PREPROCESSED: dict[str, Maker] = {
    "pixtral": _pixtral,
    "mistral3": _mistral3,
}
