"""PaliGemma and Gemma."""

from pathlib import Path

from tests.families.parts import (
    BICUBIC,
    BILINEAR,
    HALF,
    HIDDEN,
    VISION_HIDDEN,
    Maker,
    language_model,
    save_dummy_config,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
    special_ids,
    vision_tower,
)


def _paligemma(directory: Path) -> None:
    """Every picture stretched to one fixed square."""
    size = 112
    vocabulary = save_tokenizer(
        directory,
        image="",  # vLLM puts the picture's tokens before the prompt
        special=["<image>"],
        plain=["\n", *(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))],
        named={"image_token": "<image>"},
        add_bos_token=False,
    )
    save_model(
        directory,
        "paligemma",
        text_config=language_model(
            vocabulary,
            model_type="gemma",
            head_dim=32,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        vision_config=vision_tower(size, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=vocabulary["<image>"],
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        projection_dim=HIDDEN,
        **special_ids(vocabulary),
    )
    save_image_processor(
        directory,
        "SiglipImageProcessor",
        "PaliGemmaProcessor",
        size={"height": size, "width": size},
        image_seq_length=(size // 14) ** 2,
        resample=BICUBIC,
        image_mean=HALF,
        image_std=HALF,
    )


def _gemma3(directory: Path) -> None:
    """Every picture stretched to one fixed square, then its features pooled."""
    size = 112
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    vocabulary = save_tokenizer(
        directory,
        image="<start_of_image>",
        special=list(names.values()),
        plain=["\n" * count for count in range(1, 5)],
        named=names,
    )
    save_model(
        directory,
        "gemma3",
        text_config=language_model(
            vocabulary,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=1024,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        vision_config=vision_tower(size, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=vocabulary["<start_of_image>"],
        eoi_token_index=vocabulary["<end_of_image>"],
        image_token_index=vocabulary["<image_soft_token>"],
        **special_ids(vocabulary),
    )
    save_image_processor(
        directory,
        "Gemma3ImageProcessor",
        "Gemma3Processor",
        size={"height": size, "width": size},
        do_pan_and_scan=None,
        pan_and_scan_max_num_crops=None,
        pan_and_scan_min_crop_size=None,
        pan_and_scan_min_ratio_to_activate=None,
        image_seq_length=16,
        resample=BILINEAR,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "processor_config.json", processor_class="Gemma3Processor", image_seq_length=16
    )


def _gemma4(directory: Path) -> None:
    """Any shape, in at most 70 tokens."""
    names = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
    }
    vocabulary = save_tokenizer(
        directory,
        image="<|image|>",
        video="<|video|>",
        special=list(names.values()),
        named=names,
    )
    save_dummy_config(
        directory,
        "Gemma4ForConditionalGeneration",
        "gemma4",
        text_config=language_model(
            vocabulary,
            head_dim=32,
            global_head_dim=32,
            sliding_window=1024,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
            vocab_size_per_layer_input=len(vocabulary),
            hidden_size_per_layer_input=0,
        ),
        vision_config={
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "position_embedding_size": 1024,
            "default_output_length": 70,
        },
        audio_config=None,
        boi_token_id=vocabulary["<|image>"],
        eoi_token_id=vocabulary["<image|>"],
        image_token_id=vocabulary["<|image|>"],
        video_token_id=vocabulary["<|video|>"],
        audio_token_id=vocabulary["<|audio|>"],
        **special_ids(vocabulary),
    )
    save_json(
        directory / "processor_config.json",
        processor_class="Gemma4Processor",
        image_seq_length=70,
        image_processor={"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 70},
        video_processor={"video_processor_type": "Gemma4VideoProcessor"},
        feature_extractor={"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    )


FAMILIES: dict[str, Maker] = {
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}

MEASURED: dict[str, Maker] = {
    "gemma4": _gemma4,
}
