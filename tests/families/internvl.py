"""InternVL, in both formats."""

from pathlib import Path
from typing import Any

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


_CONFIGURATION = """\
from transformers import PretrainedConfig, Qwen2Config


class ChatConfig(PretrainedConfig):
    model_type = "chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        self.text_config = self.llm_config
        super().__init__(**kwargs)

    def get_text_config(self, *_, **__):
        return self.llm_config
"""


def _chat(directory: Path, architecture: str, **settings: Any) -> None:
    """A model as InternVL's authors publish it: its configuration is code (`trust_remote_code`),
    and vLLM has its own processor for it."""
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<image>"]
    vocabulary = save_tokenizer(directory, image="<image>\n", special=names)
    (directory / "configuration_chat.py").write_text(_CONFIGURATION)
    save_json(
        directory / "config.json",
        model_type="chat",
        architectures=[architecture],
        auto_map={"AutoConfig": "configuration_chat.ChatConfig"},
        dtype="float32",
        vision_config=_INTERN_VIT,
        llm_config={**language_model(vocabulary), "architectures": ["Qwen2ForCausalLM"]},
        **_CHAT,
        **settings,
    )


_INTERN_VIT = vision_tower(
    112,
    num_channels=3,
    qkv_bias=True,
    qk_normalization=False,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    norm_type="layer_norm",
    initializer_factor=0.1,
)
_CHAT = {
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "select_layer": -1,
    "ps_version": "v2",
    "force_image_size": 112,
}


def _internvl_chat(directory: Path) -> None:
    _chat(directory, "InternVLChatModel")


def _skywork_r1v(directory: Path) -> None:
    _chat(directory, "SkyworkR1VChatModel")


def _h2ovl(directory: Path) -> None:
    """A picture that is alone is cut twice, by different grids."""
    _chat(directory, "H2OVLChatModel", use_msac=True)


def _qianfan_ocr(directory: Path) -> None:
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<image>"]
    vocabulary = save_tokenizer(directory, image="<image>\n", special=names)
    save_json(
        directory / "config.json",
        model_type="qianfan_ocr",
        architectures=["QianfanOCRForConditionalGeneration"],
        dtype="float32",
        vision_config=_INTERN_VIT,
        text_config={**language_model(vocabulary, head_dim=32), "model_type": "qwen3"},
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        **_CHAT,
    )


FAMILIES: dict[str, Maker] = {
    "internvl": _internvl,
}

PREPROCESSED: dict[str, Maker] = {
    "internvl_chat": _internvl_chat,
    "skywork_r1v": _skywork_r1v,
    "qianfan_ocr": _qianfan_ocr,
}

MEASURED: dict[str, Maker] = {
    "h2ovl": _h2ovl,
}
