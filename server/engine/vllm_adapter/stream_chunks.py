"""Chunks of a streamed chat answer that hold text alone, without pydantic.

vLLM makes three pydantic models of every chunk and serialises them: about a tenth of the event
loop's time for a request with eight tokens. Most chunks hold a piece of text and nothing else. For
them the structs here stand in for vLLM's models, and write the same JSON. Whatever holds more (tool
calls, reasoning, log-probabilities, usage) becomes vLLM's own model.
"""

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion import serving
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)

_encode = msgspec.json.Encoder().encode  # leaves out what is not set
_TEXT_FIELDS = frozenset({"role", "content"})


def install() -> None:
    """Let vLLM's chat route make its chunks here."""
    route: Any = serving
    route.DeltaMessage = delta
    route.ChatCompletionResponseStreamChoice = choice
    route.ChatCompletionStreamResponse = chunk


class TextDelta(msgspec.Struct):
    """A `DeltaMessage` of text, with its fields in the order in which pydantic writes them."""

    role: str | UnsetType | None = UNSET
    content: str | UnsetType | None = UNSET

    # vLLM looks at these as well.
    reasoning: ClassVar[None] = None
    tool_calls: ClassVar[tuple[()]] = ()


class TextChoice(msgspec.Struct):
    """A `ChatCompletionResponseStreamChoice` of text."""

    index: int
    delta: TextDelta
    logprobs: UnsetType | None = UNSET
    finish_reason: str | UnsetType | None = UNSET
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET

    tool_calls: ClassVar[tuple[()]] = ()


class TextChunk(msgspec.Struct):
    """A `ChatCompletionStreamResponse` whose choices are all of text."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Any = UNSET
    system_fingerprint: str | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_text: str | UnsetType | None = UNSET

    def model_dump_json(self, *, exclude_unset: bool) -> str:
        """The JSON that pydantic would write of the chunk."""
        if exclude_unset and self.usage is UNSET:
            return _encode(self).decode()
        return _model(_fields(self)).model_dump_json(exclude_unset=exclude_unset)


def delta(**fields: Any) -> TextDelta | DeltaMessage:
    """In the place of the class `DeltaMessage`."""
    if fields.keys() <= _TEXT_FIELDS and not isinstance(fields.get("content"), list):
        return TextDelta(**fields)
    return DeltaMessage(**fields)


def choice(**fields: Any) -> TextChoice | ChatCompletionResponseStreamChoice:
    """In the place of the class `ChatCompletionResponseStreamChoice`."""
    of_text = type(fields["delta"]) is TextDelta
    if of_text and fields.get("logprobs") is None:
        return TextChoice(**fields)
    return _choice_model(fields) if of_text else ChatCompletionResponseStreamChoice(**fields)


def chunk(**fields: Any) -> TextChunk | ChatCompletionStreamResponse:
    """In the place of the class `ChatCompletionStreamResponse`."""
    choices = fields["choices"]
    if choices and type(choices[0]) is TextChoice and "usage" not in fields:
        return TextChunk(**fields)
    return _model(fields)


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    """Those that were set."""
    items = ((name, getattr(struct, name)) for name in struct.__struct_fields__)
    return {name: value for name, value in items if value is not UNSET}


def _model(fields: dict[str, Any]) -> ChatCompletionStreamResponse:
    choices = [
        _choice_model(_fields(each)) if type(each) is TextChoice else each
        for each in fields["choices"]
    ]
    return ChatCompletionStreamResponse(**{**fields, "choices": choices})


def _choice_model(fields: dict[str, Any]) -> ChatCompletionResponseStreamChoice:
    text = DeltaMessage(**_fields(fields["delta"]))
    return ChatCompletionResponseStreamChoice(**{**fields, "delta": text})
