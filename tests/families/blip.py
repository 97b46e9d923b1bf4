"""BLIP-2."""

from pathlib import Path

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


def _blip2(directory: Path) -> None:
    """Every picture in eight learned queries, before the prompt."""
    size = 112
    vocabulary = save_tokenizer(directory, image="", special=["<image>"])
    save_config(
        directory,
        "blip-2",
        text_config=language_model(vocabulary, model_type="opt"),
        vision_config=vision_tower(size),
        qformer_config={"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
        num_query_tokens=8,
        image_token_index=vocabulary["<image>"],
    )
    save_image_processor(
        directory,
        "BlipImageProcessor",
        "Blip2Processor",
        size={"height": size, "width": size},
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    save_json(
        directory / "processor_config.json", processor_class="Blip2Processor", num_query_tokens=8
    )


PREPROCESSED: dict[str, Maker] = {
    "blip2": _blip2,
}
