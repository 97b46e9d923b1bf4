"""Families that cut pictures into tiles: Llama 4, Cohere2 Vision, Granite 4 Vision, Step3."""

from pathlib import Path

from tests.families.parts import (
    BICUBIC,
    BILINEAR,
    CLIP_MEAN,
    CLIP_STD,
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


def _llama4(directory: Path) -> None:
    """Up to 16 tiles of 112 pixels, and the whole picture."""
    tile = 112
    markers = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>",
               "<|tile_x_separator|>", "<|tile_y_separator|>"]  # fmt: skip
    vocabulary = save_tokenizer(directory, image="<|image|>", special=markers)
    save_dummy_config(
        directory,
        "Llama4ForConditionalGeneration",
        "llama4",
        text_config=language_model(
            vocabulary,
            head_dim=32,
            intermediate_size_mlp=2 * HIDDEN,
            num_local_experts=2,
            interleave_moe_layer_step=2,
        ),
        vision_config=vision_tower(
            tile,
            vision_output_dim=VISION_HIDDEN,
            projector_input_dim=VISION_HIDDEN,
            projector_output_dim=VISION_HIDDEN,
            intermediate_size=4 * VISION_HIDDEN,
        ),
        boi_token_index=vocabulary["<|image_start|>"],
        eoi_token_index=vocabulary["<|image_end|>"],
        image_token_index=vocabulary["<|patch|>"],
    )
    save_image_processor(
        directory,
        "Llama4ImageProcessorFast",
        "Llama4Processor",
        size={"height": tile, "width": tile},
        max_patches=16,
        resize_to_max_canvas=False,
        resample=BILINEAR,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="Llama4Processor",
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        fake_image_token="<|image|>",
        image_token="<|image|>",
    )


def _cohere2_vision(directory: Path) -> None:
    """Up to twelve tiles of 112 pixels, and a thumbnail."""
    tile = 112
    names = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    vocabulary = save_tokenizer(
        directory, image="<|IMG_PATCH|>", special=list(names.values()), named=names
    )
    save_dummy_config(
        directory,
        "Cohere2VisionForConditionalGeneration",
        "cohere2_vision",
        text_config=language_model(vocabulary, model_type="cohere2", sliding_window=1024),
        vision_config=vision_tower(tile, model_type="siglip_vision_model", vision_use_head=False),
        image_token_id=vocabulary["<|IMG_PATCH|>"],
        alignment_intermediate_size=2 * HIDDEN,
    )
    save_image_processor(
        directory,
        "Cohere2VisionImageProcessorFast",
        "Cohere2VisionProcessor",
        size={"height": tile, "width": tile},
        patch_size=14,
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    save_json(directory / "processor_config.json", processor_class="Cohere2VisionProcessor")


def _step3_vl(directory: Path) -> None:
    """The whole picture at 728 pixels, and patches of 504; both sizes are fixed in vLLM."""
    markers = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>",
               "<patch_newline>"]  # fmt: skip
    vocabulary = save_tokenizer(directory, image="<im_patch>", special=markers)
    text = language_model(vocabulary)
    save_json(
        directory / "config.json",
        architectures=["Step3VLForConditionalGeneration"],
        model_type="step3_vl",
        dtype="float32",
        text_config={
            **text,
            "model_type": "step3_text",
            "architectures": ["Step3TextForCausalLM"],
            "num_attention_groups": 1,
            "head_dim": 32,
            "share_q_dim": 64,
            "share_expert_dim": HIDDEN,
            "moe_intermediate_size": HIDDEN,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_layers_enum": "1",
            "max_position_embedding": 8192,
        },
        vision_config={
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "output_hidden_size": VISION_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 728,
            "patch_size": 14,
        },
        image_token_id=vocabulary["<im_patch>"],
        image_token_len=169,
        patch_token_len=81,
        understand_projector_stride=2,
        projector_bias=False,
    )


def _granite4_vision(directory: Path) -> None:
    """The whole picture and its tiles on the best of five grids, pooled by Q-Formers."""
    tile = 128
    grid = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]]
    vocabulary = save_tokenizer(directory, image="<image>\n", special=["<image>"])
    save_dummy_config(
        directory,
        "Granite4VisionForConditionalGeneration",
        "granite4_vision",
        text_config=language_model(vocabulary, model_type="granite", num_hidden_layers=4),
        vision_config=vision_tower(
            tile, 16, model_type="siglip_vision_model", vision_use_head=False
        ),
        image_token_index=vocabulary["<image>"],
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[0, 1, 2, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": VISION_HIDDEN,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 512,
            "use_qformer_text_input": False,
            "hidden_size": VISION_HIDDEN,
            "num_attention_heads": 1,
            "encoder_hidden_size": VISION_HIDDEN,
        },
    )
    save_image_processor(
        directory,
        "LlavaNextImageProcessor",
        "Granite4VisionProcessor",
        size={"height": tile, "width": tile},
        do_center_crop=False,
        do_pad=True,
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=grid,
        resample=BICUBIC,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="Granite4VisionProcessor",
        image_token="<image>",
        patch_size=16,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
    )


MEASURED: dict[str, Maker] = {
    "llama4": _llama4,
    "cohere2_vision": _cohere2_vision,
    "granite4_vision": _granite4_vision,
    "step3_vl": _step3_vl,
}
