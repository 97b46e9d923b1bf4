"""Tiny checkpoints of vision-language model families, with random weights, made on the fly.

They let a test compare how two servers prepare the same picture: the image rules of each family
are the real ones (tile splitting, any-resolution grids, pixel limits), only scaled down to small
tiles, and the weights, though random, make the answer depend on the pixels. Nothing is
downloaded. A checkpoint has the layout of its family on the Hugging Face hub, and takes two to
four megabytes and a tenth of a second.

    model = build("qwen2_vl", Path("/tmp/models"))

Three families have quirks, also in vLLM:

* smolvlm needs the package `num2words`, although only for videos: put `import_stubs()` on the
  server's PYTHONPATH where it is not installed;
* paligemma takes at most one picture, and vLLM itself puts it before the prompt;
* gemma3 and paligemma should see all of a picture's tokens at once. vLLM's CPU attention does
  not, without a warning: its answers are repeatable, but differ from those of Transformers.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from server.engine.vllm_adapter import plugin

plugin.make_torchvision_importable()  # before transformers imports torchvision

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_HALF = [0.5, 0.5, 0.5]
_BILINEAR, _BICUBIC, _LANCZOS = 2, 3, 1

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_BASE_TOKENS = (_END_OF_TEXT, _TURN_START, _TURN_END)

_HIDDEN = (
    128  # width of the language model: four heads of 32, a size that vLLM's CPU attention supports
)
_VISION_HIDDEN = 64

_CORPUS = (
    "what colour is the shape? red green blue circle square triangle",
    "describe the picture and name the differences between the first image and the second image",
    "\n\n",  # so that the blank line is one token, as in the real vocabularies
)
"""What the tokenizers learn to merge: enough that ordinary prompts are not all single bytes."""


def build(family: str, directory: Path) -> Path:
    """Return the checkpoint of `family` below `directory`; creates it if it does not exist.

    Safe to call from several processes at once: the folder appears complete or not at all.
    """
    target = directory / family
    if (target / "config.json").exists():
        return target
    make = {**FAMILIES, **PREPROCESSED}[family]
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{family}-", dir=directory))
    try:
        make(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except OSError:
        if not (target / "config.json").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def import_stubs(directory: Path) -> Path:
    """Return a folder below `directory` for PYTHONPATH, with stand-ins for missing packages.

    So far one: `num2words`, without which SmolVLM's processor refuses to start.
    """
    stubs = directory / "import_stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    (stubs / "num2words.py").write_text("def num2words(number):\n    return str(number)\n")
    return stubs


# --- shared parts -------------------------------------------------------------------------------


def _save_tokenizer(
    directory: Path,
    *,
    image: str,
    video: str = "",
    special: Iterable[str] = (),
    plain: Iterable[str] = (),
    named: dict[str, str] | None = None,
    **settings: Any,
) -> dict[str, int]:
    """Write a byte-level BPE tokenizer with a chat template, and return its vocabulary.

    `image` and `video` are the template's text for one picture or video. `special` are the
    family's special tokens and `plain` further whole tokens of text. `named` gives some of the
    special tokens as attributes to the tokenizer (`image_token`, ...).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=[*_BASE_TOKENS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS * 10, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END_OF_TEXT,
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        extra_special_tokens=named or list(special),
        chat_template=_chat_template(image, video),
        **settings,
    )
    fast.save_pretrained(directory)
    return dict(fast.get_vocab())


def _chat_template(image: str, video: str) -> str:
    """Turns between `<|im_start|>` and `<|im_end|>`; the content's parts in their given order."""
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ " + repr(image) + " }}"
        "{% elif part['type'] == 'video' %}{{ " + repr(video) + " }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _language_model(vocabulary: dict[str, int], **settings: Any) -> dict[str, Any]:
    """The `text_config` of a two-layer language model over `vocabulary`."""
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **_special_ids(vocabulary),
        **settings,
    }


def _special_ids(vocabulary: dict[str, int]) -> dict[str, int]:
    return {
        "bos_token_id": vocabulary[_END_OF_TEXT],
        "eos_token_id": vocabulary[_TURN_END],
        "pad_token_id": vocabulary[_END_OF_TEXT],
    }


def _vision_tower(image_size: int, patch_size: int = 14, **settings: Any) -> dict[str, Any]:
    """The `vision_config` of a small tower of the CLIP and SigLIP kind."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": 2 * _VISION_HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        **settings,
    }


def _save_model(directory: Path, model_type: str, **settings: Any) -> None:
    """Write config.json and model.safetensors: random float32 weights, the same each time."""
    config = AutoConfig.for_model(model_type, dtype="float32", **settings)
    added_tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(20)
        model = AutoModelForImageTextToText.from_config(config)
        _draw_weights(model, silent=[token["id"] for token in added_tokens if token["special"]])
    model.save_pretrained(directory)
    _rename_vision_weights(directory / "model.safetensors", config.vision_config.model_type)


def _rename_vision_weights(file: Path, tower: str) -> None:
    """Give the weights of a CLIP or SigLIP tower the names they have in published checkpoints.

    Transformers since 5.0 saves them without the part `vision_model`, and vLLM 0.32 looks for
    nothing else.
    """
    if tower not in {"clip_vision_model", "siglip_vision_model"}:
        return
    prefix = "vision_tower."
    weights = {
        name.replace(prefix, prefix + "vision_model.") if name.startswith(prefix) else name: weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _draw_weights(model: PreTrainedModel, silent: list[int]) -> None:
    """Redraw every matrix so that signals neither vanish nor explode.

    With the usual small standard deviation, the vision tower's output would be negligible in the
    residual stream of a model this small. The output rows of the `silent`
    tokens are zero, so that no answer ends early or names a picture.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is not words:
        words.normal_(
            std=0.5
        )  # of the same scale as the picture, so that an answer does not repeat itself
        head.mul_(2)  # well separated log-probabilities
    else:  # Gemma: scales what it reads from the shared matrix, and adds 1 to the norm's weight
        words.mul_(0.25)
        model.get_decoder().norm.weight.fill_(7)
    head[silent] = 0


def _save_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _save_image_processor(directory: Path, kind: str, processor: str, **settings: Any) -> None:
    """Write preprocessor_config.json for image processor `kind` in the given `processor`."""
    _save_json(
        directory / "preprocessor_config.json",
        image_processor_type=kind,
        processor_class=processor,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        **settings,
    )


# --- Qwen ---------------------------------------------------------------------------------------


def _qwen_tokenizer(directory: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Write the tokenizer of the Qwen-VL families; return vocabulary and the config's ids."""
    markers = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    start, end, image, video = markers
    vocabulary = _save_tokenizer(
        directory, image=start + image + end, video=start + video + end, special=markers
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return vocabulary, {
        name: vocabulary[marker] for name, marker in zip(names, markers, strict=True)
    }


def _qwen_rope(sections: list[int], **settings: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": sections,
        **settings,
    }


def _qwen2_images(directory: Path, processor: str) -> None:
    """Any size in steps of 28 pixels, up to 1280 tokens."""
    _save_image_processor(
        directory,
        "Qwen2VLImageProcessor",
        processor,
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )


def _qwen2_vl(directory: Path) -> None:
    vocabulary, ids = _qwen_tokenizer(directory)
    vision = {"depth": 2, "embed_dim": _VISION_HIDDEN, "hidden_size": _HIDDEN, "num_heads": 2}
    _save_model(
        directory,
        "qwen2_vl",
        text_config=_language_model(vocabulary, rope_parameters=_qwen_rope([4, 6, 6])),
        vision_config={**vision, "mlp_ratio": 2},
        **ids,
    )
    _qwen2_images(directory, "Qwen2VLProcessor")


def _qwen2_5_vl(directory: Path) -> None:
    vocabulary, ids = _qwen_tokenizer(directory)
    _save_model(
        directory,
        "qwen2_5_vl",
        text_config=_language_model(vocabulary, rope_parameters=_qwen_rope([4, 6, 6])),
        vision_config={
            "depth": 3,
            "hidden_size": _VISION_HIDDEN,
            "intermediate_size": 2 * _VISION_HIDDEN,
            "num_heads": 2,
            "out_hidden_size": _HIDDEN,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        **ids,
    )
    _qwen2_images(directory, "Qwen2_5_VLProcessor")


def _qwen3_vl(directory: Path) -> None:
    """Steps of 32 pixels; the vision tower feeds several layers of the language model."""
    vocabulary, ids = _qwen_tokenizer(directory)
    rope = _qwen_rope([6, 5, 5], mrope_interleaved=True)
    _save_model(
        directory,
        "qwen3_vl",
        text_config=_language_model(vocabulary, head_dim=32, rope_parameters=rope),
        vision_config={
            "depth": 3,
            "hidden_size": _VISION_HIDDEN,
            "intermediate_size": 2 * _VISION_HIDDEN,
            "num_heads": 2,
            "out_hidden_size": _HIDDEN,
            "num_position_embeddings": 24 * 24,
            "deepstack_visual_indexes": [0, 1],
        },
        **ids,
    )
    _save_image_processor(
        directory,
        "Qwen2VLImageProcessorFast",
        "Qwen3VLProcessor",
        size={"shortest_edge": 256 * 256, "longest_edge": 32 * 32 * 1280},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=_HALF,
        image_std=_HALF,
    )
    _save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="Qwen3VLVideoProcessor",
        processor_class="Qwen3VLProcessor",
        size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 1280},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=_HALF,
        image_std=_HALF,
    )


# --- LLaVA --------------------------------------------------------------------------------------


def _llava(directory: Path) -> None:
    """The shorter edge to 112 pixels, then the middle square."""
    vocabulary = _save_tokenizer(directory, image="<image>\n", special=["<image>"])
    _save_model(
        directory,
        "llava",
        text_config=_language_model(vocabulary, model_type="llama"),
        vision_config=_vision_tower(112, model_type="clip_vision_model"),
        image_token_index=vocabulary["<image>"],
        image_seq_length=64,
    )
    _save_image_processor(
        directory,
        "CLIPImageProcessor",
        "LlavaProcessor",
        size={"shortest_edge": 112},
        do_center_crop=True,
        crop_size={"height": 112, "width": 112},
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )
    _save_llava_processor(directory, "LlavaProcessor")


def _llava_next(directory: Path) -> None:
    """The whole picture, and up to four tiles of it on the best of five grids."""
    grid = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
    vocabulary = _save_tokenizer(directory, image="<image>\n", special=["<image>"])
    _save_model(
        directory,
        "llava_next",
        text_config=_language_model(vocabulary, model_type="llama"),
        vision_config=_vision_tower(112, model_type="clip_vision_model"),
        image_token_index=vocabulary["<image>"],
        image_seq_length=64,
        image_grid_pinpoints=grid,
    )
    _save_image_processor(
        directory,
        "LlavaNextImageProcessor",
        "LlavaNextProcessor",
        size={"shortest_edge": 112},
        do_center_crop=True,
        do_pad=True,
        crop_size={"height": 112, "width": 112},
        image_grid_pinpoints=grid,
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )
    _save_llava_processor(directory, "LlavaNextProcessor")


def _save_llava_processor(directory: Path, processor: str) -> None:
    _save_json(
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
    vocabulary = _save_tokenizer(
        directory, image="<image>\n", video="<video>\n", special=["<image>", "<video>"]
    )
    _save_model(
        directory,
        "llava_onevision",
        text_config=_language_model(vocabulary, model_type="qwen2"),
        vision_config=_vision_tower(tile, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
    )
    resize = {
        "size": {"height": tile, "width": tile},
        "resample": _BICUBIC,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    _save_image_processor(
        directory,
        "LlavaOnevisionImageProcessor",
        "LlavaOnevisionProcessor",
        do_pad=True,
        image_grid_pinpoints=grid,
        **resize,
    )
    _save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="LlavaOnevisionVideoProcessor",
        processor_class="LlavaOnevisionProcessor",
        **resize,
    )
    _save_json(
        directory / "processor_config.json",
        processor_class="LlavaOnevisionProcessor",
        image_token="<image>",
        video_token="<video>",
        num_image_tokens=(tile // 14) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


# --- Idefics ------------------------------------------------------------------------------------


def _idefics3(directory: Path) -> None:
    _idefics_like(directory, "idefics3", "Idefics3", tile=112, scale_factor=2)


def _smolvlm(directory: Path) -> None:
    _idefics_like(directory, "smolvlm", "SmolVLM", tile=126, scale_factor=3)


def _idefics_like(
    directory: Path, model_type: str, name: str, *, tile: int, scale_factor: int
) -> None:
    """The longer edge to four tiles, split into tiles row by row, then the whole picture."""
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    markers = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    vocabulary = _save_tokenizer(directory, image="<image>", special=[*markers, *cells])
    _save_model(
        directory,
        model_type,
        text_config=_language_model(vocabulary, model_type="llama"),
        vision_config=_vision_tower(tile),
        image_token_id=vocabulary["<image>"],
        scale_factor=scale_factor,
        pad_token_id=vocabulary[_END_OF_TEXT],
    )
    split = {
        "size": {"longest_edge": 4 * tile},
        "max_image_size": {"longest_edge": tile},
        "do_pad": True,
        "resample": _LANCZOS,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    _save_image_processor(
        directory,
        f"{name}ImageProcessor",
        f"{name}Processor",
        do_image_splitting=True,
        **split,
    )
    _save_json(
        directory / "processor_config.json",
        processor_class=f"{name}Processor",
        image_seq_len=(tile // 14 // scale_factor) ** 2,
    )


# --- InternVL -----------------------------------------------------------------------------------


def _internvl(directory: Path) -> None:
    """Up to twelve tiles on the grid nearest to the picture's shape, and a thumbnail."""
    tile = 112
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    vocabulary = _save_tokenizer(
        directory,
        image="<IMG_CONTEXT>\n",
        video="<video>\n",
        special=list(names.values()),
        named=names,
    )
    _save_model(
        directory,
        "internvl",
        text_config=_language_model(vocabulary, model_type="qwen2"),
        vision_config=_vision_tower(tile, attention_bias=True),
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    resize = {
        "size": {"height": tile, "width": tile},
        "resample": _BICUBIC,
        "image_mean": _IMAGENET_MEAN,
        "image_std": _IMAGENET_STD,
    }
    _save_image_processor(
        directory,
        "GotOcr2ImageProcessorFast",
        "InternVLProcessor",
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        **resize,
    )
    _save_json(
        directory / "video_preprocessor_config.json",
        video_processor_type="InternVLVideoProcessor",
        processor_class="InternVLProcessor",
        **resize,
    )
    _save_json(
        directory / "processor_config.json",
        processor_class="InternVLProcessor",
        image_seq_length=16,
    )


# --- Gemma --------------------------------------------------------------------------------------


def _paligemma(directory: Path) -> None:
    """Every picture stretched to one fixed square."""
    size = 112
    vocabulary = _save_tokenizer(
        directory,
        image="",  # vLLM puts the picture's tokens before the prompt
        special=["<image>"],
        plain=["\n", *(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))],
        named={"image_token": "<image>"},
        add_bos_token=False,
    )
    _save_model(
        directory,
        "paligemma",
        text_config=_language_model(
            vocabulary,
            model_type="gemma",
            head_dim=32,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        vision_config=_vision_tower(size, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=vocabulary["<image>"],
        vocab_size=len(vocabulary),
        hidden_size=_HIDDEN,
        projection_dim=_HIDDEN,
        **_special_ids(vocabulary),
    )
    _save_image_processor(
        directory,
        "SiglipImageProcessor",
        "PaliGemmaProcessor",
        size={"height": size, "width": size},
        image_seq_length=(size // 14) ** 2,
        resample=_BICUBIC,
        image_mean=_HALF,
        image_std=_HALF,
    )


def _gemma3(directory: Path) -> None:
    """Every picture stretched to one fixed square, then its features pooled."""
    size = 112
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    vocabulary = _save_tokenizer(
        directory,
        image="<start_of_image>",
        special=list(names.values()),
        plain=["\n" * count for count in range(1, 5)],
        named=names,
    )
    _save_model(
        directory,
        "gemma3",
        text_config=_language_model(
            vocabulary,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=1024,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        vision_config=_vision_tower(size, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=vocabulary["<start_of_image>"],
        eoi_token_index=vocabulary["<end_of_image>"],
        image_token_index=vocabulary["<image_soft_token>"],
        **_special_ids(vocabulary),
    )
    _save_image_processor(
        directory,
        "Gemma3ImageProcessor",
        "Gemma3Processor",
        size={"height": size, "width": size},
        do_pan_and_scan=None,
        pan_and_scan_max_num_crops=None,
        pan_and_scan_min_crop_size=None,
        pan_and_scan_min_ratio_to_activate=None,
        image_seq_length=16,
        resample=_BILINEAR,
        image_mean=_HALF,
        image_std=_HALF,
    )
    _save_json(
        directory / "processor_config.json", processor_class="Gemma3Processor", image_seq_length=16
    )


FAMILIES: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}
"""Each family's maker, which writes a checkpoint into an existing, empty folder."""


# --- families for preprocessing only ------------------------------------------------------------


def _pixtral(directory: Path) -> None:
    """Any size in steps of 16 pixels, the longer edge up to 256."""
    _pixtral_like(
        directory,
        "llava",
        patch=16,
        merge=1,
        longest_edge=256,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _mistral3(directory: Path) -> None:
    """Any size in steps of 28 pixels, the longer edge up to 400, which is not a multiple of 28."""
    _pixtral_like(directory, "mistral3", patch=14, merge=2, longest_edge=400, spatial_merge_size=2)


def _pixtral_like(
    directory: Path, model_type: str, *, patch: int, merge: int, longest_edge: int, **settings: Any
) -> None:
    markers = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary = _save_tokenizer(directory, image="[IMG]", special=markers)
    vision = _vision_tower(longest_edge, patch, model_type="pixtral", head_dim=32)
    _save_config(
        directory,
        model_type,
        text_config=_language_model(vocabulary, model_type="mistral"),
        vision_config=vision,
        image_token_index=vocabulary["[IMG]"],
        **settings,
    )
    _save_image_processor(
        directory,
        "PixtralImageProcessorFast",
        "PixtralProcessor",
        size={"longest_edge": longest_edge},
        patch_size={"height": patch, "width": patch},
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )
    _save_json(
        directory / "processor_config.json",
        processor_class="PixtralProcessor",
        patch_size=patch,
        spatial_merge_size=merge,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )


def _blip2(directory: Path) -> None:
    """Every picture in eight learned queries, before the prompt."""
    size = 112
    vocabulary = _save_tokenizer(directory, image="", special=["<image>"])
    _save_config(
        directory,
        "blip-2",
        text_config=_language_model(vocabulary, model_type="opt"),
        vision_config=_vision_tower(size),
        qformer_config={"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
        num_query_tokens=8,
        image_token_index=vocabulary["<image>"],
    )
    _save_image_processor(
        directory,
        "BlipImageProcessor",
        "Blip2Processor",
        size={"height": size, "width": size},
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )
    _save_json(
        directory / "processor_config.json", processor_class="Blip2Processor", num_query_tokens=8
    )


def _internvl_chat(directory: Path) -> None:
    """InternVL as its authors publish it: its configuration is code (`trust_remote_code`), and
    vLLM has its own processor for it."""
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<image>"]
    vocabulary = _save_tokenizer(directory, image="<image>\n", special=names)
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
    _save_json(
        directory / "config.json",
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        vision_config=_vision_tower(112),
        llm_config={**_language_model(vocabulary), "architectures": ["Qwen2ForCausalLM"]},
        downsample_ratio=0.5,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
    )


def _save_config(directory: Path, model_type: str, **settings: Any) -> None:
    """Write config.json for a checkpoint without weights."""
    config = AutoConfig.for_model(model_type, dtype="float32", **settings)
    config.architectures = [type(AutoModelForImageTextToText.from_config(config)).__name__]
    config.save_pretrained(directory)


PREPROCESSED: dict[str, Callable[[Path], None]] = {
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "blip2": _blip2,
    "internvl_chat": _internvl_chat,
}
"""Families whose checkpoints have no weights: their processors can be run, but not they."""
