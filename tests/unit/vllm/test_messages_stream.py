"""Streams of messages that are written without vLLM's models hold the events that vLLM would
write."""

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.anthropic.protocol import (
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    AnthropicStreamEvent,
    AnthropicUsage,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.outputs import RequestOutput
from vllm.parser import ParserManager

from server.concurrency import DONE
from server.engine.vllm_adapter import messages_stream, text_stream
from server.engine.vllm_adapter.messages_stream import MessagesStream
from server.request.context import RequestContext, entered
from server.telemetry.record import Record
from tests.streams import (
    COUNTS,
    REASONS,
    STEPS,
    TEXT,
    TOKENIZER,
    Engine,
    events_of,
    output,
    serving_with,
    vllms_chunks,
)

TOOL = {"name": "f", "input_schema": {"type": "object"}}


def messages_serving(**options: Any) -> AnthropicServingMessages:
    """vLLM's serving class for messages, with what its streams read of it."""
    made = object.__new__(AnthropicServingMessages)
    made.__dict__.update(serving_with(**options).__dict__)
    return made


def chat_of(**options: Any) -> ChatCompletionRequest:
    """The chat that vLLM makes of a request for a message."""
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]}
    return AnthropicServingMessages.to_chat_completion_request(
        AnthropicMessagesRequest.model_validate({**asked, "stream": True, **options})
    )


def ours(
    serving: AnthropicServingMessages,
    chat: ChatCompletionRequest,
    outputs: Sequence[RequestOutput | Exception],
) -> list[str]:
    """The events that are written here, with a mark in each usage."""

    async def run() -> list[str]:
        written: list[bytes] = []

        def write(events: bytes, more: bool) -> Awaitable[None]:
            written.append(events)
            return DONE

        context = RequestContext(Record(), writes_text=True)
        with entered(context):
            made: Any = text_stream._stream(
                serving,
                {AnthropicServingMessages: MessagesStream},
                chat,
                Engine(outputs, together=False).generate(context),
                "chatcmpl-1",
                "m",
                [],
                TOKENIZER,
                RequestResponseMetadata(request_id="r"),
                mm_token_counts=COUNTS,
            )
            stream = messages_stream._converted(serving, made)
            assert isinstance(stream, MessagesStream)
            await stream.write(write, lambda event: event["usage"].update(mark=1), in_callback=True)
        return b"".join(written).decode().split("\n\n")[:-1]

    return asyncio.run(run())


def vllms(
    serving: AnthropicServingMessages,
    chat: ChatCompletionRequest,
    outputs: Sequence[RequestOutput | Exception],
) -> list[str]:
    """The events that vLLM makes."""
    return events_of(lambda: messages_stream._vllms(serving, vllms_chunks(serving, chat, outputs)))


def parsed(events: list[str]) -> list[tuple[str, Any]]:
    """The name and the content of each event."""
    found = []
    for event in events:
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def unmarked(events: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """`events` without the marks, which are in each usage."""
    for _, content in events:
        holder = content.get("message", content)
        if "usage" in holder:
            assert holder["usage"].pop("mark") == 1
    return events


@given(STEPS, TEXT, REASONS, st.booleans(), st.sampled_from([None, "hermes"]))
def test_events_equal_vllms(
    steps: list[tuple[str, list[int]]],
    end: str,
    reasons: tuple[str, int | str | None],
    details: bool,
    parser: str | None,
) -> None:
    outputs = [output((0, *step, None, None)) for step in steps]
    outputs.append(output((0, end, [5], *reasons), finished=True))
    serving = messages_serving(
        parser_cls=ParserManager.get_parser(parser, enable_auto_tools=True),
        enable_prompt_tokens_details=details,
    )
    # Without it, vLLM looks for tool calls although there are no tools.
    chat = chat_of(**({"tool_choice": {"type": "none"}} if parser else {}))
    written = unmarked(parsed(ours(serving, chat, outputs)))
    assert written == parsed(vllms(serving, chat, outputs))


def test_a_failure_is_the_last_event() -> None:
    outputs = [output((0, "a", [1], None, None)), ValueError("no such thing")]
    serving = messages_serving()
    written = parsed(ours(serving, chat_of(), outputs))
    expected = parsed(vllms(serving, chat_of(), outputs))
    assert [name for name, _ in written] == [name for name, _ in expected]
    assert written[-1][0] == "error"
    assert set(written[-1][1]["error"]) >= {"message", "code"}


@pytest.mark.parametrize(
    ("serving", "request_"),
    [
        ({"parser_cls": ParserManager.get_parser(None, "qwen3")}, {}),
        ({"parser_cls": ParserManager.get_parser("hermes", None, True)}, {}),
        ({"parser_cls": ParserManager.get_parser("hermes", None, True)}, {"tools": [TOOL]}),
        ({"enable_log_outputs": True}, {}),
    ],
)
def test_a_message_with_more_than_text_is_left_to_vllm(
    serving: dict[str, Any], request_: dict[str, Any]
) -> None:
    made = messages_serving(**serving)
    assert not text_stream.is_text_alone(made, chat_of(**request_))


def test_every_field_of_vllms_events_is_known() -> None:
    """A field that vLLM adds may change its JSON: `messages_stream` must then be extended."""
    assert list(AnthropicUsage.model_fields) == [
        "input_tokens",
        "output_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    ]
    assert list(AnthropicStreamEvent.model_fields) == [
        "type",
        "message",
        "delta",
        "content_block",
        "index",
        "error",
        "usage",
    ]
    assert list(AnthropicMessagesResponse.model_fields) == [
        "id",
        "type",
        "role",
        "content",
        "model",
        "stop_reason",
        "stop_sequence",
        "usage",
        "kv_transfer_params",
        "ec_transfer_params",
    ]
