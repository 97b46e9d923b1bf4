"""Systems of the literature that vLLM has no class for, or whose class the other modules leave out.

The layout of each is that of its published checkpoint; sizes are small.
"""

from pathlib import Path

from tests.families.parts import (
    BICUBIC,
    BILINEAR,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    HIDDEN,
    Maker,
    language_model,
    save_image_processor,
    save_json,
    save_model,
    save_tokenizer,
    special_ids,
    vision_tower,
)

_QUERIES = 64
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def _idefics2(directory: Path) -> None:
    """One view of up to 112 x 112 pixels in its own shape, or five, with 64 queries each."""
    size = 112
    markers = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    vocabulary = save_tokenizer(directory, image="<image>", special=markers)
    save_model(
        directory,
        "idefics2",
        text_config=language_model(vocabulary, model_type="mistral", sliding_window=None),
        vision_config=vision_tower(size),
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": _QUERIES,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
        },
        image_token_id=vocabulary["<image>"],
        **special_ids(vocabulary),
    )
    save_image_processor(
        directory,
        "Idefics2ImageProcessor",
        "Idefics2Processor",
        size={"shortest_edge": 42, "longest_edge": size},
        do_image_splitting=False,
        do_pad=True,
        resample=BILINEAR,
        image_mean=HALF,
        image_std=HALF,
    )
    save_json(
        directory / "processor_config.json",
        processor_class="Idefics2Processor",
        image_seq_len=_QUERIES,
    )


def _instructblip(directory: Path) -> None:
    """Every picture in 32 queries, before the prompt; the Q-Former reads the prompt."""
    size = 112
    vocabulary = save_tokenizer(directory, image="", special=["<image>"])
    _save_words(directory / "qformer_tokenizer")
    save_model(
        directory,
        "instructblip",
        text_config=language_model(vocabulary, model_type="llama"),
        vision_config=vision_tower(size),
        qformer_config=_qformer(vocab_size=64, max_position_embeddings=32),
        num_query_tokens=32,
        image_token_index=vocabulary["<image>"],
    )
    (directory / "chat_template.jinja").write_text(_PLAIN_TEMPLATE)
    _save_blip_processor(directory, "InstructBlipProcessor", size)


def _qformer(**settings: int) -> dict[str, int]:
    return {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        **settings,
    }


def _save_blip_processor(directory: Path, processor: str, size: int) -> None:
    save_image_processor(
        directory,
        "BlipImageProcessor",
        processor,
        size={"height": size, "width": size},
        resample=BICUBIC,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    save_json(directory / "processor_config.json", processor_class=processor, num_query_tokens=32)


def _save_words(directory: Path) -> None:
    """A tokenizer of the kind of BERT's, with the words of the tests' prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "shown", "here", "?", "colour")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side="right"
    )
    fast.save_pretrained(directory)


def _blip2(directory: Path) -> None:
    """Every picture in 32 queries, before the prompt."""
    size = 112
    vocabulary = save_tokenizer(directory, image="", special=["<image>"])
    save_model(
        directory,
        "blip-2",
        text_config=language_model(
            vocabulary, model_type="opt", ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN
        ),
        vision_config=vision_tower(size),
        qformer_config=_qformer(),
        num_query_tokens=32,
        image_token_index=vocabulary["<image>"],
    )
    _save_blip_processor(directory, "Blip2Processor", size)


LITERATURE: dict[str, Maker] = {
    "idefics2": _idefics2,
    "instructblip": _instructblip,
    "blip2_opt": _blip2,
}
