"""The LLaVA families."""

from pathlib import Path

from tests.families.parts import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Maker,
    language_model,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
    vision_tower,
)


def _llava(directory: Path) -> None:
    """The shorter edge to 112 pixels, then the middle square."""
    vocabulary = save_tokenizer(directory, image="<image>\n", special=["<image>"])
    save_model(
        directory,
        "llava",
        text_config=language_model(vocabulary, model_type="llama"),
        vision_config=vision_tower(112, model_type="clip_vision_model"),
        image_token_index=vocabulary["<image>"],
        image_seq_length=64,
    )
    save_image_processor(
        directory,
        "CLIPImageProcessor",
        "LlavaProcessor",
        size={"shortest_edge": 112},
        do_center_crop=True,
        crop_size={"height": 112, "width": 112},
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    _save_llava_processor(directory, "LlavaProcessor")


def _llava_next(directory: Path) -> None:
    """The whole picture, and up to four tiles of it on the best of five grids."""
    grid = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
    vocabulary = save_tokenizer(directory, image="<image>\n", special=["<image>"])
    save_model(
        directory,
        "llava_next",
        text_config=language_model(vocabulary, model_type="llama"),
        vision_config=vision_tower(112, model_type="clip_vision_model"),
        image_token_index=vocabulary["<image>"],
        image_seq_length=64,
        image_grid_pinpoints=grid,
    )
    save_image_processor(
        directory,
        "LlavaNextImageProcessor",
        "LlavaNextProcessor",
        size={"shortest_edge": 112},
        do_center_crop=True,
        do_pad=True,
        crop_size={"height": 112, "width": 112},
        image_grid_pinpoints=grid,
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    _save_llava_processor(directory, "LlavaNextProcessor")


def _save_llava_processor(directory: Path, processor: str) -> None:
    save_json(
        directory / "processor_config.json",
        processor_class=processor,
        image_token="<image>",
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def _llava_onevision(directory: Path) -> None:
    """The whole picture and its tiles on one of 36 grids, in all at most about nine tiles' worth
    of tokens."""
    tile = 112
    grid = [[tile * rows, tile * columns] for rows in range(1, 7) for columns in range(1, 7)]
    vocabulary = save_tokenizer(
        directory, image="<image>\n", video="<video>\n", special=["<image>", "<video>"]
    )
    save_model(
        directory,
        "llava_onevision",
        text_config=language_model(vocabulary, model_type="qwen2"),
        vision_config=vision_tower(tile, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
    )
    resize = {
        "size": {"height": tile, "width": tile},
        "resample": BICUBIC,
        "image_mean": HALF,
        "image_std": HALF,
    }
    save_image_processor(
        directory,
        "LlavaOnevisionImageProcessor",
        "LlavaOnevisionProcessor",
        do_pad=True,
        image_grid_pinpoints=grid,
        **resize,
    )
    save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="LlavaOnevisionVideoProcessor",
        processor_class="LlavaOnevisionProcessor",
        **resize,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="LlavaOnevisionProcessor",
        image_token="<image>",
        video_token="<video>",
        num_image_tokens=(tile // 14) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


FAMILIES: dict[str, Maker] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
