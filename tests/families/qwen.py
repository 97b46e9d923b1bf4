"""The Qwen-VL families."""

from pathlib import Path
from typing import Any

from tests.families.parts import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    HIDDEN,
    VISION_HIDDEN,
    Maker,
    experts,
    language_model,
    save_dummy_config,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
)


def qwen_tokenizer(directory: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Write the tokenizer of the Qwen-VL families; return vocabulary and the config's ids."""
    markers = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    start, end, image, video = markers
    vocabulary = save_tokenizer(
        directory, image=start + image + end, video=start + video + end, special=markers
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return vocabulary, {
        name: vocabulary[marker] for name, marker in zip(names, markers, strict=True)
    }


def qwen_rope(sections: list[int], **settings: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": sections,
        **settings,
    }


def qwen2_images(directory: Path, processor: str, temporal_patch_size: int = 2) -> None:
    """Any size in steps of 28 pixels, up to 1280 tokens."""
    save_image_processor(
        directory,
        "Qwen2VLImageProcessor",
        processor,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        patch_size=14,
        temporal_patch_size=temporal_patch_size,
        merge_size=2,
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def _qwen2_vl(directory: Path) -> None:
    vocabulary, ids = qwen_tokenizer(directory)
    vision = {"depth": 2, "embed_dim": VISION_HIDDEN, "hidden_size": HIDDEN, "num_heads": 2}
    save_model(
        directory,
        "qwen2_vl",
        text_config=language_model(vocabulary, rope_parameters=qwen_rope([4, 6, 6])),
        vision_config={**vision, "mlp_ratio": 2},
        **ids,
    )
    qwen2_images(directory, "Qwen2VLProcessor")


def _qwen2_5_vl(directory: Path) -> None:
    vocabulary, ids = qwen_tokenizer(directory)
    save_model(
        directory,
        "qwen2_5_vl",
        text_config=language_model(vocabulary, rope_parameters=qwen_rope([4, 6, 6])),
        vision_config={
            "depth": 3,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        **ids,
    )
    qwen2_images(directory, "Qwen2_5_VLProcessor")


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 2 * VISION_HIDDEN,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 24 * 24,
    "deepstack_visual_indexes": [0, 1],
}


def _qwen3_vl(directory: Path) -> None:
    """Steps of 32 pixels; the vision tower feeds several layers of the language model."""
    vocabulary, ids = qwen_tokenizer(directory)
    rope = qwen_rope([6, 5, 5], mrope_interleaved=True)
    save_model(
        directory,
        "qwen3_vl",
        text_config=language_model(vocabulary, head_dim=32, rope_parameters=rope),
        vision_config=QWEN3_VISION,
        **ids,
    )
    qwen3_images(directory)


def qwen3_images(directory: Path, processor: str = "Qwen3VLProcessor") -> None:
    """Any size in steps of 32 pixels, up to 1280 tokens."""
    save_image_processor(
        directory,
        "Qwen2VLImageProcessorFast",
        processor,
        size={"shortest_edge": 256 * 256, "longest_edge": 32 * 32 * 1280},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="Qwen3VLVideoProcessor",
        processor_class=processor,
        size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 1280},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=HALF,
        image_std=HALF,
    )


def _qwen3_vl_moe(directory: Path) -> None:
    vocabulary, ids = qwen_tokenizer(directory)
    rope = qwen_rope([6, 5, 5], mrope_interleaved=True)
    save_dummy_config(
        directory,
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        text_config=language_model(vocabulary, head_dim=32, rope_parameters=rope, **experts()),
        vision_config=QWEN3_VISION,
        **ids,
    )
    qwen3_images(directory)


def _qwen3_5(directory: Path) -> None:
    """Every fourth layer of the language model has full attention, the others linear."""
    vocabulary, ids = qwen_tokenizer(directory)
    rope = qwen_rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25)
    text = language_model(
        vocabulary,
        head_dim=32,
        rope_parameters=rope,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    vision = {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
    save_dummy_config(
        directory,
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        text_config=text,
        vision_config=vision,
        **ids,
    )
    qwen3_images(directory)


FAMILIES: dict[str, Maker] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}

PREPROCESSED: dict[str, Maker] = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
}
