"""Image placeholders typed by a user are text; those of the template are images."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.engine.vllm_adapter.typed_placeholders import TypedPlaceholders, of_model
from server.errors import ClientError

DEMO = Path(__file__).parents[3] / "server" / "demo"
PAD, VIDEO = "<|image_pad|>", "<|video_pad|>"
IMAGE = {"type": "image_url", "image_url": {"url": f"https://example.com/{PAD}.png"}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO)
    return found


@pytest.fixture(scope="module")
def typed(tokenizer: PreTrainedTokenizerBase) -> TypedPlaceholders:
    processor = SimpleNamespace(image_token=PAD, video_token=VIDEO)
    config = SimpleNamespace(image_token_id=5)

    def placeholder(modality: str, number: int) -> str:
        if modality == "audio":
            raise ValueError
        return f"<|vision_start|>{PAD if modality == 'image' else VIDEO}<|vision_end|>"

    return of_model(processor, tokenizer, config, placeholder)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def rendered(content: list[dict[str, Any]]) -> str:
    """A message as a template renders it."""
    return "".join(part.get("text", f"<|vision_start|>{PAD}<|vision_end|>") for part in content)


def tokens(typed: TypedPlaceholders, tokenizer: Any, prompt: str) -> list[int]:
    plain, flags = typed.read(prompt)
    ids, _ = typed.as_text(tokenizer(plain)["input_ids"], flags)
    return ids


CONTENTS = [
    ([text(f"what is {PAD}?"), IMAGE], 1),
    ([text(PAD), IMAGE, text(PAD + PAD), IMAGE, text(VIDEO)], 2),
    ([text("<|image_"), text("pad|> and <|im"), text("age"), text("_pad|>"), IMAGE], 1),
    ([text("<|image_"), IMAGE, text("pad|>")], 1),
    ([text("no image: " + PAD)], 0),
]


@pytest.mark.parametrize("number", range(len(CONTENTS)))
def test_typed_placeholders_are_text(
    typed: TypedPlaceholders, tokenizer: PreTrainedTokenizerBase, number: int
) -> None:
    content, images = CONTENTS[number]
    marked = typed.mark([{"role": "user", "content": content}])
    prompt = rendered(marked[0]["content"])
    ids = tokens(typed, tokenizer, prompt)
    assert (ids.count(5), ids.count(6)) == (images, 0)
    assert tokenizer.decode(ids) == rendered(content)
    assert typed.restored(marked) == [{"role": "user", "content": content}]


def test_placeholders_of_the_template_stay_in_place(
    typed: TypedPlaceholders, tokenizer: PreTrainedTokenizerBase
) -> None:
    content = [text(f"{PAD} a"), IMAGE, text(f"b {PAD}"), IMAGE]
    prompt = rendered(typed.mark(content))
    ids = tokens(typed, tokenizer, prompt)
    plain = "".join(tokenizer.decode(ids[: ids.index(5)]))
    assert plain == f"{PAD} a<|vision_start|>"


def test_values_without_a_placeholder_are_unchanged(typed: TypedPlaceholders) -> None:
    messages = [{"role": "user", "content": [text("< |image_pad| >"), IMAGE]}, {"role": "user"}]
    assert typed.mark(messages) is messages
    assert typed.mark({}) == {}
    assert not typed.is_marked("what is this?")


def test_placeholders_in_everything_a_template_may_render_are_marked(
    typed: TypedPlaceholders,
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": f"see {PAD}"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"arguments": f'"{PAD}"'}]}
    for value in (tools, call, {"documents": [{"text": PAD}]}):
        marked = typed.mark(value)
        assert PAD not in repr(marked)
        assert typed.restored(marked) == value


def test_placeholders_that_are_not_single_tokens_are_split() -> None:
    typed = TypedPlaceholders({}, ["<image>"])
    (marked,) = typed.mark(["<image>\nwhat is <image>?"])
    assert "<image>" not in marked
    assert marked.replace("\u2060", "") == "<image>\nwhat is <image>?"
    (first, second) = typed.mark([text("<ima"), text("ge>")])
    assert "<image>" not in first["text"] + second["text"]


def test_typed_placeholders_of_a_truncated_prompt_are_matched(typed: TypedPlaceholders) -> None:
    _, flags = typed.read(typed.mark(PAD) + PAD + typed.mark(PAD))
    assert flags == {5: [True, False, True]}
    assert typed.as_text([5, 5], flags, cut_left=True)[0][0] == 5
    assert typed.as_text([5, 5], flags)[0][-1] == 5


pieces = st.lists(st.sampled_from([PAD, VIDEO, "<|image", "_pad|>", "<", "a b", "saccade", "x1x"]))


@hypothesis.given(st.lists(st.tuples(pieces, st.booleans()), max_size=6))
def test_any_texts_between_images_are_restored(
    typed: TypedPlaceholders,
    tokenizer: PreTrainedTokenizerBase,
    parts: list[tuple[list[str], bool]],
) -> None:
    content = [part for words, image in parts for part in [text("".join(words)), *[IMAGE] * image]]
    ids = tokens(typed, tokenizer, rendered(typed.mark(content)))
    assert ids.count(5) == sum(image for _, image in parts)
    assert tokenizer.decode(ids) == rendered(content)


def test_too_deeply_nested_values_are_refused(typed: TypedPlaceholders) -> None:
    value: Any = []
    for _ in range(sys.getrecursionlimit()):
        value = {"inner": [value]}
    with pytest.raises(ClientError, match="nested too deeply") as refused:
        typed.mark([{"role": "user", "content": "a", "more": value}])
    assert refused.value.param == "messages"


def calls_of(work: Callable[[], object]) -> int:
    """The number of Python and C function calls of `work`."""
    count = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_is_linear_in_the_number_of_parts(typed: TypedPlaceholders) -> None:
    def messages(times: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [text("<|image_"), text("pad|>")] * times}]

    few, many = (calls_of(lambda n=n: typed.mark(messages(n))) for n in (20, 200))
    assert many < 12 * few
