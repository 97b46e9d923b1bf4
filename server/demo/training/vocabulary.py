"""The tokenizer of the demo model: byte-level BPE in which each word of its world is one token.

Capitals and digits are single tokens, so texts in pictures are spelled out. Coordinates 0, 10 ..
1000 have tokens too, which only answers with boxes use: no other text is split into them.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.demo.drawing import COLORS, SHAPES
from server.demo.scoring import OUTSIDE
from server.demo.training import phrases, words

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END_OF_TEXT, START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
COORDINATES = range(0, 1001, 10)
SIZE = 1280  # tokens, a multiple of 64

_SPLIT = r" ?[A-Z]?[a-z]+|[A-Z0-9]| ?[^\sA-Za-z0-9]+|\s+"
_BOX = re.compile(r"\[\d+0?(?:, \d+0?){3}\]")

TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- set clips = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set pictures.count = pictures.count + 1 -%}
{{- 'Picture ' ~ pictures.count ~ ': <|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set clips.count = clips.count + 1 -%}
{{- 'Video ' ~ clips.count ~ ': <|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


# One answer of each kind that is longer than a name.
_ANSWERS = (
    OUTSIDE,
    words.HELLO,
    words.ABILITIES,
    words.UNKNOWN,
    *("yes", "no", "different", "the same", "the first", "the last"),
    "a red circle, an orange star and two blue squares on a white background",
    "a red circle that moves left on an orange background",
    json.dumps({"color": "red", "shape": "star", "background": "red", "position": "left"}),
    json.dumps({"count": 2, "color": "red"}),
    json.dumps({"objects": [{"color": "red", "shape": "star"}, {"color": "red"}]}),
)


def _corpus() -> Iterator[str]:
    """All wordings and words of questions and answers, the frequent ones more often."""
    names = (*COLORS, *SHAPES, *words.ORDINALS, *words.NUMBERS, *words.LABELS, *words.DIRECTIONS)
    for name in (*names, *map(words.plural, SHAPES), "top", "center", "bottom", "above", "below"):
        for _ in range(50):
            yield f"{name} {name} {name.capitalize()}"
    yield from [
        "Picture 1: Video 1: <0.5 seconds>",
        *["user user", "assistant assistant", "system system"],
        *_ANSWERS,
    ] * 50
    for wordings in phrases.WORDINGS.values():
        for text in wordings.training:
            bare = re.sub(r"\{\w+\}", "", text)
            yield from [bare, bare, f" {bare}", bare[0].lower() + bare[1:]]
    for wordings in phrases.CHAT.values():
        yield from wordings.training * 3
    yield from [*phrases.BEFORE, *phrases.AFTER, *phrases.SYSTEM] * 30


def build() -> Tokenizer:
    """Builds the tokenizer; the same at every call."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(COORDINATES) + 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    described = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = described["model"]["vocab"]
    for coordinate in COORDINATES[1:]:  # "0" is there as a digit
        vocabulary[str(coordinate)] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(described))


class Codec:
    """Text to token ids as in training: boxes as coordinate tokens, other text as it is split."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        self._split = lru_cache(maxsize=20_000)(self._encode)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that contains no special tokens."""
        return list(self._split(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        if _BOX.fullmatch(text):
            pieces = re.findall(r"\d+|, |\[|\]", text)
            return tuple(token for piece in pieces for token in self._piece(piece))
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _piece(self, piece: str) -> list[int]:
        token = self.tokenizer.token_to_id(piece) if piece.isdigit() else None
        if token is not None:
            return [token]
        return self.tokenizer.encode(piece, add_special_tokens=False).ids

    def word(self, text: str) -> list[int]:
        """The tokens of one word: at the start of a text, and after another word."""
        forms = [text] if text.isdigit() or len(text) == 1 else [text, f" {text}"]
        ids = [self._piece(form) for form in forms]
        if tokens := [form[0] for form in ids if len(form) == 1]:
            return tokens
        raise ValueError(f"{text!r} is not one token: {ids}")


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, its configuration and the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[END_OF_TEXT],
        "additional_special_tokens": list(SPECIAL),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
