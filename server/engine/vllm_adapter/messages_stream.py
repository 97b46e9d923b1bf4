"""Streamed answers to messages, in Anthropic's dialect, that hold text alone.

vLLM writes them as a chat, three pydantic models and JSON for each chunk, and then reads each chunk
again to make another model and JSON of it.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from vllm.entrypoints.anthropic import serving as anthropic
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo
from vllm.outputs import CompletionOutput, RequestOutput

from server.engine.vllm_adapter.text_stream import TextChoice, TextStream

_encode = msgspec.json.Encoder().encode
_vllms = AnthropicServingMessages.message_stream_converter

_BLOCK_START = (
    b"event: content_block_start\n"
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
_BLOCK_STOP = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
_DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":%b}}\n\n'
)
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


def install() -> None:
    """Let the answers that `MessagesStream` writes pass vLLM's converter as they are."""
    route: Any = AnthropicServingMessages
    route.message_stream_converter = _converted


def _converted(
    serving: AnthropicServingMessages, generator: "AsyncGenerator[str, None] | MessagesStream"
) -> "AsyncGenerator[str, None] | MessagesStream":
    """In the place of the method of `AnthropicServingMessages`."""
    return generator if isinstance(generator, MessagesStream) else _vllms(serving, generator)


class MessagesStream(TextStream):
    """The events of one message."""

    _has_block = False
    _finish_reason: str | None = None
    _stop_reason: int | str | None = None

    @staticmethod
    def fits(serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
        """True: the usage is in the first and in the last event, whatever a chat would have."""
        return True

    def _begin(self, output: RequestOutput) -> list[bytes]:
        super()._begin(output)
        prompt_tokens = len(output.prompt_token_ids or ()) + len(
            output.encoder_prompt_token_ids or ()
        )
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, 0, None),
        }
        self._complete(message)
        return [_event("message_start", message=message)]

    def _events_of(self, choice: TextChoice, part: CompletionOutput) -> Sequence[bytes]:
        if part.finish_reason is not None:
            self._finish_reason, self._stop_reason = part.finish_reason, part.stop_reason
        if not part.text:
            return ()
        delta = _DELTA % _encode(part.text)
        if self._has_block:
            return (delta,)
        self._has_block = True
        return _BLOCK_START, delta

    def _end(self) -> bytes:
        usage = self._usage()
        reason, sequence = anthropic._to_anthropic_stop_reason(
            self._finish_reason or "stop", self._stop_reason, tool_used=False, tool_complete=False
        )
        event = {
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage(
                usage["prompt_tokens"], usage["completion_tokens"], self._details_of_prompt()
            ),
        }
        self._complete(event)
        block = _BLOCK_STOP if self._has_block else b""
        return block + _event("message_delta", **event) + _STOP

    def _failed(self, event: bytes) -> bytes:
        return b"event: error\n" + event


def _usage(
    prompt_tokens: int, completion_tokens: int, of_prompt: PromptTokenUsageInfo | None
) -> dict[str, Any]:
    """The usage in Anthropic's terms, of what a chat would have in its own."""
    usage = UsageInfo(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        prompt_tokens_details=of_prompt,
    )
    return anthropic._build_anthropic_usage(usage).model_dump(exclude_unset=True)


def _event(kind: str, **content: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **content}))
