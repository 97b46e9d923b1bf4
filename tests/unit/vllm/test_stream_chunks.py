"""Chunks encoded without pydantic equal the bytes that vLLM's models encode."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionLogProbs,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from server.engine.vllm_adapter import stream_chunks
from server.engine.vllm_adapter.stream_chunks import TextChoice, TextChunk, TextDelta

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # no lone surrogates
IDS = st.none() | st.lists(st.integers(0, 200_000), max_size=4)


def some(**fields: Any) -> Any:
    """Dictionaries with some of `fields`."""
    return st.fixed_dictionaries({}, optional=fields)


DELTAS = some(role=st.just("assistant"), content=st.none() | TEXT)
CHOICES = some(
    logprobs=st.none(),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    stop_reason=st.none() | st.integers(0, 9) | TEXT,
    token_ids=IDS,
)
CHUNKS = some(prompt_token_ids=IDS, prompt_text=st.none() | TEXT)
LATER = some(system_fingerprint=TEXT, usage=st.builds(UsageInfo, prompt_tokens=st.integers(0, 9)))


def written(
    classes: Any, delta: dict[str, Any], choice: dict[str, Any], chunk: dict[str, Any], later: Any
) -> str:
    """The JSON of a chunk, built as in vLLM's route."""
    made_delta = classes[0](**delta)
    made_choice = classes[1](index=1, delta=made_delta, **choice)
    made = classes[2](
        id="chatcmpl-1",
        object="chat.completion.chunk",
        created=1,
        choices=[made_choice],
        model="m",
        **chunk,
    )
    for name, value in later.items():
        setattr(made, name, value)
    text: str = made.model_dump_json(exclude_unset=True)
    return text


OURS = (stream_chunks.delta, stream_chunks.choice, stream_chunks.chunk)
VLLM = (DeltaMessage, ChatCompletionResponseStreamChoice, ChatCompletionStreamResponse)


@given(DELTAS, CHOICES, CHUNKS, LATER)
def test_a_text_chunk_is_encoded_as_by_pydantic(
    delta: dict[str, Any], choice: dict[str, Any], chunk: dict[str, Any], later: dict[str, Any]
) -> None:
    assert written(OURS, delta, choice, chunk, later) == written(VLLM, delta, choice, chunk, later)


CALL = DeltaToolCall(index=0, id="call-1", function=DeltaFunctionCall(name="f", arguments="{}"))


@pytest.mark.parametrize(
    ("delta", "choice"),
    [
        ({"tool_calls": [CALL]}, {"finish_reason": "tool_calls"}),
        ({"reasoning": "because"}, {}),
        ({"content": "a"}, {"logprobs": ChatCompletionLogProbs(content=[])}),
    ],
)
def test_a_chunk_with_more_than_text_is_encoded_by_pydantic(
    delta: dict[str, Any], choice: dict[str, Any]
) -> None:
    assert written(OURS, delta, choice, {}, {}) == written(VLLM, delta, choice, {}, {})


def test_a_delta_from_a_parser_keeps_its_type() -> None:
    delta = DeltaMessage(reasoning="because")
    choice: Any = stream_chunks.choice(index=0, delta=delta)
    assert isinstance(choice, ChatCompletionResponseStreamChoice)
    assert choice.delta.reasoning == "because"


def test_every_field_of_vllms_chunk_models_is_known() -> None:
    """A field that vLLM adds changes its JSON: `stream_chunks` must then be extended."""
    assert list(DeltaMessage.model_fields) == [*fields(TextDelta), "reasoning", "tool_calls"]
    assert list(ChatCompletionResponseStreamChoice.model_fields) == fields(TextChoice)
    assert list(ChatCompletionStreamResponse.model_fields) == [*fields(TextChunk), "metrics"]


def fields(struct: type[msgspec.Struct]) -> list[str]:
    return list(struct.__struct_fields__)
