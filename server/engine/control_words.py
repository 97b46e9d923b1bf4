"""Keeps the control tokens of a model, such as `<|im_start|>`, out of texts that no user typed.

A tokenizer makes a control token of such a word wherever it stands, so a document could end the
user's turn and begin one of the system. In the text of a document an invisible character parts
these words, and they are read as text.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from server.engine.vllm_adapter.typed_placeholders import WORD_JOINER

# What control tokens look like that the tokenizer does not call special, such as `<think>`.
_BRACKETED = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")


def parting(tokenizer: Any) -> Callable[[str], str]:
    """A function that returns a text with all control words of `tokenizer` (one of transformers,
    or None) parted."""
    words = sorted({word for word in _words(tokenizer) if len(word) > 1}, key=len, reverse=True)
    if not words:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, words)))
    return lambda text: pattern.sub(_parted, text)


def _words(tokenizer: Any) -> Iterator[str]:
    yield from getattr(tokenizer, "all_special_tokens", ())
    for token in getattr(tokenizer, "added_tokens_decoder", {}).values():
        if token.special or _BRACKETED.fullmatch(token.content):
            yield token.content


def _parted(match: re.Match[str]) -> str:
    return match[0][0] + WORD_JOINER + match[0][1:]
