"""Control words of a model are text where a document has them."""

from types import SimpleNamespace

from transformers import AutoTokenizer

from server.engine.arguments import DEMO_MODEL
from server.engine.control_words import parting


def test_no_control_token_is_made_of_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    words = tokenizer.all_special_tokens
    text = f"a {'b'.join(words)}<{words[0]}{words[1]} <|other|>"
    assert set(tokenizer.all_special_ids) & set(tokenizer.encode(text))
    parted = parting(tokenizer)(text)
    assert not set(tokenizer.all_special_ids) & set(tokenizer.encode(parted))
    assert parted.replace("\u2060", "") == text
    assert parted.endswith("<|other|>")


def test_words_that_are_not_called_special_are_parted_if_they_look_like_it() -> None:
    contents = ("<think>", "[INST]", "\n\n", "  ", "the", "[1]")
    added = {i: SimpleNamespace(content=word, special=False) for i, word in enumerate(contents)}
    part = parting(SimpleNamespace(added_tokens_decoder=added))
    assert part("<think>\n\n  the [1]") == "<\u2060think>\n\n  the [1]"
    assert part("[INST]") == "[\u2060INST]"


def test_without_a_tokenizer_texts_are_as_they_are() -> None:
    assert parting(None)("<s>") == "<s>"
