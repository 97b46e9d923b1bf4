"""DeepSeek-VL2 and DeepSeek-OCR, and Kimi."""

from pathlib import Path
from typing import Any

from tests.families.parts import (
    HIDDEN,
    VISION_HIDDEN,
    Maker,
    language_model,
    save_dummy_config,
    save_json,
    save_tokenizer,
)


def _language(vocabulary: dict[str, int], **settings: Any) -> dict[str, Any]:
    """Without a latent cache, which vLLM has not on a CPU."""
    return language_model(
        vocabulary,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        **settings,
    )


_PLAIN = {
    "topk_method": "greedy",
    "use_mla": False,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
    "head_dim": 32,
}


def _deepseek_ocr(directory: Path) -> None:
    """The vision towers have their real sizes, 0.4 billion weights: vLLM has no others."""
    vocabulary = save_tokenizer(directory, image="<image>\n", special=["<image>"])
    _save_config(directory, vocabulary, "DeepseekOCRForCausalLM", "deepseek_vl_v2", _PLAIN, 2048)
    save_json(directory / "processor_config.json", processor_class="DeepseekOCRProcessor")


def _unlimited_ocr(directory: Path) -> None:
    vocabulary = save_tokenizer(directory, image="<image>\n", special=["<image>"])
    _save_config(directory, vocabulary, "UnlimitedOCRForCausalLM", "unlimited-ocr", _PLAIN, 2048)
    save_json(directory / "processor_config.json", processor_class="UnlimitedOCRProcessor")


def _deepseek_vl2(directory: Path) -> None:
    """Tiles of 112 pixels on one of a few grids, and the whole; three pictures have no tiles."""
    vocabulary = save_tokenizer(
        directory,
        image="<image>\n",
        special=["<image>", "<|grounding|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"],
        plain=["<|User|>", "<|Assistant|>"],
    )
    _save_config(directory, vocabulary, "DeepseekVLV2ForCausalLM", "deepseek_vl_v2", _PLAIN, 128)
    save_json(
        directory / "processor_config.json",
        processor_class="DeepseekVLV2Processor",
        candidate_resolutions=_RESOLUTIONS,
        patch_size=14,
        downsample_ratio=2,
        image_token="<image>",
        pad_token="<|endoftext|>",
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        normalize=True,
    )


_RESOLUTIONS = [[112, 112], [112, 224], [224, 112], [224, 224], [112, 336], [336, 112]]


def _save_config(
    directory: Path,
    vocabulary: dict[str, int],
    architecture: str,
    model_type: str,
    attention: dict[str, Any],
    width: int,
) -> None:
    save_json(
        directory / "config.json",
        architectures=[architecture],
        model_type=model_type,
        dtype="float32",
        candidate_resolutions=_RESOLUTIONS,
        global_view_pos="head",
        tile_tag="2D",
        language_config={
            **_language(vocabulary, **attention),
            "architectures": ["DeepseekForCausalLM"],
        },
        projector_config={
            "projector_type": "linear" if width == 2048 else "downsample_mlp_gelu",
            "input_dim": width,
            "n_embed": HIDDEN,
            "downsample_ratio": 2,
        },
        vision_config={
            "image_size": 112,
            "patch_size": 14,
            "width": width,
            "layers": 2,
            "heads": 2,
        },
    )


def _kimi_k25(directory: Path) -> None:
    """Any size in steps of 28 pixels; pictures and pieces of videos are the same modality."""
    placeholder = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    vocabulary = save_tokenizer(
        directory,
        image=placeholder,
        special=["<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"],
    )
    save_dummy_config(
        directory,
        "KimiK25ForConditionalGeneration",
        "kimi_k25",
        text_config=_language(
            vocabulary,
            model_type="deepseek_v3",
            n_group=1,
            topk_group=1,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        ),
        vision_config={
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mm_hidden_size": VISION_HIDDEN,
        },
        image_token_id=vocabulary["<|media_pad|>"],
        use_unified_vision_chunk=True,
    )
    save_json(
        directory / "preprocessor_config.json",
        media_proc_cfg={
            "in_patch_limit": 4096,
            "in_patch_limit_each_frame": 1024,
            "in_patch_limit_video": None,
            "patch_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "merge_kernel_size": 2,
            "fixed_output_tokens": None,
            "patch_limit_on_one_side": 512,
            "sample_fps": 2,
            "max_num_frames_each_video": None,
            "temporal_merge_kernel_size": 4,
            "timestamp_mode": "hh:mm:ss.fff",
        },
    )


MEASURED: dict[str, Maker] = {
    "deepseek_ocr": _deepseek_ocr,
    "deepseek_vl2": _deepseek_vl2,
    "unlimited_ocr": _unlimited_ocr,
    "kimi_k25": _kimi_k25,
}
