"""Pixtral and Mistral 3, in both formats."""

import base64
from pathlib import Path
from typing import Any

from tests.families.parts import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    HIDDEN,
    VISION_HIDDEN,
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


def _pixtral_mistral(directory: Path) -> None:
    """Pixtral in Mistral's format: its tokenizer, mistral-common's, places the pictures."""
    words = [bytes([value]) for value in range(256)]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
               "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]",
               "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
               "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]  # fmt: skip
    tokens = len(words) + len(special)
    save_json(
        directory / "tekken.json",
        config={
            "pattern": r"\p{L}+|\p{N}|[^\p{L}\p{N}]",
            "num_vocab_tokens": len(words),
            "default_vocab_size": tokens,
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        vocab=[
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
        special_tokens=[
            {"rank": rank, "token_str": word, "is_control": True}
            for rank, word in enumerate(special)
        ],
        multimodal={"image_patch_size": 16, "max_image_size": 256, "spatial_merge_size": 1},
    )
    save_json(
        directory / "params.json",
        dim=HIDDEN,
        n_layers=2,
        head_dim=32,
        hidden_dim=2 * HIDDEN,
        n_heads=4,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=tokens,
        rope_theta=1_000_000.0,
        max_position_embeddings=8192,
        dtype="float32",
        vision_encoder={
            "hidden_size": VISION_HIDDEN,
            "num_channels": 3,
            "image_size": 256,
            "patch_size": 16,
            "rope_theta": 10_000.0,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_token_id": special.index("[IMG]"),
            "adapter_bias": True,
        },
    )


PREPROCESSED: dict[str, Maker] = {
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "pixtral_mistral": _pixtral_mistral,
}
