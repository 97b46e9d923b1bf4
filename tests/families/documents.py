"""GLM-4.xV and families that read documents: GLM-OCR, PaddleOCR-VL, dots.ocr."""

from pathlib import Path
from typing import Any

from tests.families.parts import (
    CLIP_MEAN,
    CLIP_STD,
    HIDDEN,
    VISION_HIDDEN,
    Maker,
    language_model,
    save_dummy_config,
    save_image_processor,
    save_json,
    save_tokenizer,
    vision_tower,
)
from tests.families.qwen import qwen2_images, qwen_rope, qwen_tokenizer

_GLM_MARKERS = (
    "<|begin_of_image|>", "<|end_of_image|>", "<|image|>",
    "<|begin_of_video|>", "<|end_of_video|>", "<|video|>",
)  # fmt: skip


def _glm(directory: Path, architecture: str, model_type: str, **text: Any) -> None:
    """Any size in steps of 28 pixels, up to 1280 tokens."""
    vocabulary = save_tokenizer(
        directory,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
        special=_GLM_MARKERS,
    )
    names = {
        "image_start": "<|begin_of_image|>",
        "image_end": "<|end_of_image|>",
        "image": "<|image|>",
        "video_start": "<|begin_of_video|>",
        "video_end": "<|end_of_video|>",
        "video": "<|video|>",
    }
    save_dummy_config(
        directory,
        architecture,
        model_type,
        text_config=language_model(
            vocabulary,
            rope_parameters={**qwen_rope([4, 6, 6]), "partial_rotary_factor": 1.0},
            **text,
        ),
        vision_config={
            "depth": 2,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
        },
        **{f"{name}_token_id": vocabulary[marker] for name, marker in names.items()},
    )
    size = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 1280}
    for file, kind in (("", "Image"), ("video_", "Video")):
        save_json(
            directory / f"{file}preprocessor_config.json",
            **{f"{kind.lower()}_processor_type": f"Glm4v{kind}Processor"},
            processor_class="Glm4vProcessor",
            size=size,
            patch_size=14,
            temporal_patch_size=2,
            merge_size=2,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
        )


def _glm4v(directory: Path) -> None:
    _glm(directory, "Glm4vForConditionalGeneration", "glm4v")


def _glm4v_moe(directory: Path) -> None:
    _glm(
        directory,
        "Glm4vMoeForConditionalGeneration",
        "glm4v_moe",
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
    )


def _glm_ocr(directory: Path) -> None:
    _glm(directory, "GlmOcrForConditionalGeneration", "glm_ocr", head_dim=32)


def _paddleocr_vl(directory: Path) -> None:
    start, end, image = "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"
    vocabulary = save_tokenizer(
        directory,
        image=start + image + end,
        special=[start, end, image],
        named={"image_token": image, "image_start_token": start, "image_end_token": end},
    )
    save_dummy_config(
        directory,
        "PaddleOCRVLForConditionalGeneration",
        "paddleocr_vl",
        text_config=language_model(vocabulary, head_dim=32, rope_parameters=qwen_rope([4, 6, 6])),
        vision_config=vision_tower(384),
        image_token_id=vocabulary[image],
        vision_start_token_id=vocabulary[start],
        vision_end_token_id=vocabulary[end],
    )
    save_image_processor(
        directory,
        "PaddleOCRVLImageProcessor",
        "PaddleOCRVLProcessor",
        size={"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 1280},
        patch_size=14,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def _dots_ocr(directory: Path) -> None:
    start, end, image = "<|img|>", "<|endofimg|>", "<|imgpad|>"
    vocabulary = save_tokenizer(
        directory, image=start + image + end, special=[start, end, image, "<|video_pad|>"]
    )
    (directory / "configuration_dots.py").write_text(
        "from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig as Config\n\n\n"
        "class DotsOCRConfig(Config):\n    pass\n"
    )
    save_json(
        directory / "config.json",
        architectures=["DotsOCRForCausalLM"],
        auto_map={"AutoConfig": "configuration_dots.DotsOCRConfig"},
        model_type="dots_ocr",
        dtype="float32",
        image_token_id=vocabulary[image],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_config={
            "embed_dim": VISION_HIDDEN,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        **language_model(vocabulary),
    )
    qwen2_images(directory, "Qwen2VLProcessor", temporal_patch_size=1)


def _exaone4_5(directory: Path) -> None:
    vocabulary, ids = qwen_tokenizer(directory)
    save_dummy_config(
        directory,
        "Exaone4_5_ForConditionalGeneration",
        "exaone4_5",
        text_config=language_model(
            vocabulary,
            model_type="exaone4",
            head_dim=32,
            sliding_window=None,
            layer_types=["full_attention"] * 2,
        ),
        vision_config={
            "depth": 2,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    qwen2_images(directory, "Exaone4_5_Processor")


MEASURED: dict[str, Maker] = {
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v_moe,
    "glm_ocr": _glm_ocr,
    "paddleocr_vl": _paddleocr_vl,
}

PREPROCESSED: dict[str, Maker] = {
    "dots_ocr": _dots_ocr,
    "exaone4_5": _exaone4_5,
}
