"""What the tiny checkpoints have in common: tokenizer, weights, and the sizes of small models."""

import json
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

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5]
BILINEAR, BICUBIC, LANCZOS = 2, 3, 1

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BASE_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

HIDDEN = (
    128  # width of the language model: four heads of 32, a size that vLLM's CPU attention supports
)
VISION_HIDDEN = 64

_CORPUS = (
    "what colour is the shape? red green blue circle square triangle",
    "describe the picture and name the differences between the first image and the second image",
    "\n\n",  # so that the blank line is one token, as in the real vocabularies
)
"""What the tokenizers learn to merge: enough that ordinary prompts are not all single bytes."""


Maker = Callable[[Path], None]
"""Writes a checkpoint into an existing, empty folder."""


def save_tokenizer(
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
        special_tokens=[*BASE_TOKENS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS * 10, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
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


def experts(**settings: Any) -> dict[str, Any]:
    """Settings of a language model for four experts, two of which each token goes to."""
    return {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": HIDDEN,
        **settings,
    }


def language_model(vocabulary: dict[str, int], **settings: Any) -> dict[str, Any]:
    """The `text_config` of a two-layer language model over `vocabulary`."""
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **special_ids(vocabulary),
        **settings,
    }


def special_ids(vocabulary: dict[str, int]) -> dict[str, int]:
    return {
        "bos_token_id": vocabulary[END_OF_TEXT],
        "eos_token_id": vocabulary[TURN_END],
        "pad_token_id": vocabulary[END_OF_TEXT],
    }


def vision_tower(image_size: int, patch_size: int = 14, **settings: Any) -> dict[str, Any]:
    """The `vision_config` of a small tower of the CLIP and SigLIP kind."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        **settings,
    }


def save_model(directory: Path, model_type: str, **settings: Any) -> None:
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


def save_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_image_processor(directory: Path, kind: str, processor: str, **settings: Any) -> None:
    """Write preprocessor_config.json for image processor `kind` in the given `processor`."""
    save_json(
        directory / "preprocessor_config.json",
        image_processor_type=kind,
        processor_class=processor,
        **{
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "rescale_factor": 1 / 255,
            **settings,
        },
    )


def save_dummy_config(directory: Path, architecture: str, model_type: str, **settings: Any) -> None:
    """Write config.json for a checkpoint without weights, whose model is not made here."""
    config = AutoConfig.for_model(model_type, dtype="float32", **settings)
    config.architectures = [architecture]
    config.save_pretrained(directory)


def save_config(directory: Path, model_type: str, **settings: Any) -> None:
    """Write config.json for a checkpoint without weights."""
    config = AutoConfig.for_model(model_type, dtype="float32", **settings)
    config.architectures = [type(AutoModelForImageTextToText.from_config(config)).__name__]
    config.save_pretrained(directory)
