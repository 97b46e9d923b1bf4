"""Qwen2.5-Omni and Qwen3-Omni: pictures, videos and audio."""

import json
from pathlib import Path
from typing import Any

from tests.families.parts import (
    HIDDEN,
    VISION_HIDDEN,
    Maker,
    experts,
    language_model,
    save_dummy_config,
    save_json,
    save_tokenizer,
)
from tests.families.qwen import QWEN3_VISION, qwen2_images, qwen3_images, qwen_rope

_NAMES = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_MEL_BINS = 128


def _tokenizer(directory: Path) -> dict[str, int]:
    start, end = _NAMES["vision_bos_token"], _NAMES["vision_eos_token"]
    return save_tokenizer(
        directory,
        image=start + _NAMES["image_token"] + end,
        video=start + _NAMES["video_token"] + end,
        special=list(_NAMES.values()),
        named=_NAMES,
    )


def _audio(**settings: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": _MEL_BINS,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": VISION_HIDDEN,
        "d_model": VISION_HIDDEN,
        "output_dim": HIDDEN,
        **settings,
    }


def _ids(vocabulary: dict[str, int], ending: str) -> dict[str, int]:
    kinds = {f"{kind}_token": vocabulary[_NAMES[f"{kind}_token"]] for kind in _KINDS}
    return {name + ending: number for name, number in kinds.items()} | {
        "audio_start_token_id": vocabulary[_NAMES["audio_bos_token"]],
        "audio_end_token_id": vocabulary[_NAMES["audio_eos_token"]],
        "vision_start_token_id": vocabulary[_NAMES["vision_bos_token"]],
        "vision_end_token_id": vocabulary[_NAMES["vision_eos_token"]],
    }


_KINDS = ("audio", "image", "video")


def _add_audio(directory: Path, processor: str) -> None:
    """Add what the processor needs of a Whisper feature extractor to the image processor's file."""
    path = directory / "preprocessor_config.json"
    images = json.loads(path.read_text())
    save_json(
        path,
        **images,
        feature_extractor_type="WhisperFeatureExtractor",
        feature_size=_MEL_BINS,
        sampling_rate=16000,
        hop_length=160,
        chunk_length=30,
        n_fft=400,
        padding_value=0.0,
        return_attention_mask=True,
    )


def _qwen2_5_omni(directory: Path) -> None:
    vocabulary = _tokenizer(directory)
    thinker = {
        "text_config": language_model(vocabulary, rope_parameters=qwen_rope([4, 6, 6])),
        "vision_config": {
            "depth": 3,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [2],
        },
        "audio_config": _audio(),
        **_ids(vocabulary, "_index"),
    }
    save_dummy_config(
        directory,
        "Qwen2_5OmniModel",
        "qwen2_5_omni",
        thinker_config=thinker,
        enable_audio_output=False,
    )
    qwen2_images(directory, "Qwen2_5OmniProcessor")
    _add_audio(directory, "Qwen2_5OmniProcessor")


def _qwen3_omni_moe(directory: Path) -> None:
    vocabulary = _tokenizer(directory)
    rope = qwen_rope([6, 5, 5], mrope_interleaved=True)
    thinker = {
        "text_config": language_model(vocabulary, head_dim=32, rope_parameters=rope, **experts()),
        "vision_config": {**QWEN3_VISION, "image_size": 768},
        "audio_config": _audio(downsample_hidden_size=32),
        **_ids(vocabulary, "_id"),
    }
    save_dummy_config(
        directory,
        "Qwen3OmniMoeForConditionalGeneration",
        "qwen3_omni_moe",
        thinker_config=thinker,
        enable_audio_output=False,
    )
    qwen3_images(directory, "Qwen3OmniMoeProcessor")
    _add_audio(directory, "Qwen3OmniMoeProcessor")


PREPROCESSED: dict[str, Maker] = {
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen3_omni_moe": _qwen3_omni_moe,
}
