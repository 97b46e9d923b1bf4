"""InternVL, in both formats."""

from pathlib import Path

from tests.families.parts import (
    BICUBIC,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Maker,
    language_model,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
    vision_tower,
)


def _internvl(directory: Path) -> None:
    """Up to twelve tiles on the grid nearest to the picture's shape, and a thumbnail."""
    tile = 112
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    vocabulary = save_tokenizer(
        directory,
        image="<IMG_CONTEXT>\n",
        video="<video>\n",
        special=list(names.values()),
        named=names,
    )
    save_model(
        directory,
        "internvl",
        text_config=language_model(vocabulary, model_type="qwen2"),
        vision_config=vision_tower(tile, attention_bias=True),
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    resize = {
        "size": {"height": tile, "width": tile},
        "resample": BICUBIC,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    save_image_processor(
        directory,
        "GotOcr2ImageProcessorFast",
        "InternVLProcessor",
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        **resize,
    )
    save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="InternVLVideoProcessor",
        processor_class="InternVLProcessor",
        **resize,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="InternVLProcessor",
        image_seq_length=16,
    )


def _internvl_chat(directory: Path) -> None:
    """InternVL as its authors publish it: its configuration is code (`trust_remote_code`), and
    vLLM has its own processor for it."""
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<image>"]
    vocabulary = save_tokenizer(directory, image="<image>\n", special=names)
    (directory / "configuration_internvl_chat.py").write_text(
        "from transformers import PretrainedConfig, Qwen2Config\n"
        "class InternVLChatConfig(PretrainedConfig):\n"
        "    model_type = 'internvl_chat'\n"
        "    def __init__(self, vision_config=None, llm_config=None, **kwargs):\n"
        "        self.vision_config = PretrainedConfig(**(vision_config or {}))\n"
        "        self.llm_config = Qwen2Config(**(llm_config or {}))\n"
        "        super().__init__(**kwargs)\n"
        "    def get_text_config(self, *_, **__):\n"
        "        return self.llm_config\n"
    )
    save_json(
        directory / "config.json",
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        vision_config=vision_tower(112),
        llm_config={**language_model(vocabulary), "architectures": ["Qwen2ForCausalLM"]},
        downsample_ratio=0.5,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
    )


FAMILIES: dict[str, Maker] = {
    "internvl": _internvl,
}

PREPROCESSED: dict[str, Maker] = {
    "internvl_chat": _internvl_chat,
}
