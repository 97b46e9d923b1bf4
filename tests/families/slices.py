"""Families that cut only large pictures: LFM2-VL, MiniCPM-V 4.6, Aria."""

from pathlib import Path

from tests.families.parts import (
    BILINEAR,
    HALF,
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


def _lfm2_vl(directory: Path) -> None:
    """One view of up to 64 tokens, or two to ten tiles of 128 pixels and a thumbnail."""
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    cells = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)]
    vocabulary = save_tokenizer(
        directory, image="<image>", special=[*names.values(), *cells], named=names
    )
    save_dummy_config(
        directory,
        "Lfm2VlForConditionalGeneration",
        "lfm2_vl",
        text_config=language_model(
            vocabulary,
            model_type="lfm2",
            layer_types=["conv", "full_attention"],
            conv_dim=HIDDEN,
            block_auto_adjust_ff_dim=False,
        ),
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
            "num_patches": 64,
            "vision_use_head": False,
        },
        image_token_id=vocabulary["<image>"],
        projector_hidden_size=HIDDEN,
    )
    save_image_processor(
        directory,
        "Lfm2VlImageProcessorFast",
        "Lfm2VlProcessor",
        tile_size=128,
        encoder_patch_size=16,
        min_image_tokens=4,
        max_image_tokens=64,
        max_num_patches=256,
        do_pad=True,
        resample=BILINEAR,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(directory / "processor_config.json", processor_class="Lfm2VlProcessor")


def _minicpmv4_6(directory: Path) -> None:
    """The whole picture, and up to nine slices of about 448 pixels."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    vocabulary = save_tokenizer(
        directory,
        image="<|image_pad|>",
        video="<|video_pad|>",
        special=list(names.values()),
        named=names,
    )
    save_dummy_config(
        directory,
        "MiniCPMV4_6ForConditionalGeneration",
        "minicpmv4_6",
        text_config=language_model(vocabulary, model_type="qwen3", head_dim=32),
        vision_config=vision_tower(448, 14, insert_layer_id=1),
        insert_layer_id=1,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
    )
    for file, kind in (("", "Image"), ("video_", "Video")):
        save_json(
            directory / f"{file}preprocessor_config.json",
            **{f"{kind.lower()}_processor_type": f"MiniCPMV4_6{kind}Processor"},
            processor_class="MiniCPMV4_6Processor",
            image_mean=HALF,
            image_std=HALF,
        )


def _aria(directory: Path) -> None:
    vocabulary = save_tokenizer(
        directory, image="<|img|>", special=["<|img|>"], named={"image_token": "<|img|>"}
    )
    save_dummy_config(
        directory,
        "AriaForConditionalGeneration",
        "aria",
        text_config=language_model(
            vocabulary,
            model_type="aria_text",
            head_dim=32,
            moe_num_experts=4,
            moe_topk=2,
            moe_num_shared_experts=1,
        ),
        vision_config=vision_tower(980, 14),
        projector_patch_to_query_dict={"1225": 128, "4900": 256},
        image_token_index=vocabulary["<|img|>"],
    )
    save_image_processor(
        directory,
        "AriaImageProcessor",
        "AriaProcessor",
        do_resize=False,
        max_image_size=490,
        min_image_size=336,
        split_image=False,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="AriaProcessor",
        size_conversion={"490": 128, "980": 256},
    )


MEASURED: dict[str, Maker] = {
    "lfm2_vl": _lfm2_vl,
    "minicpmv4_6": _minicpmv4_6,
    "aria": _aria,
}
