"""Streamed chat answers that hold text alone, written without a model for each chunk.

vLLM makes three pydantic models of every chunk and serialises them, and each chunk passes an
additional generator. The common stream needs none of it: only the text differs from chunk to chunk.
`TextStream` writes its events from what is equal in all of them. Streams with more in them (tool
calls, reasoning, log-probabilities, token ids, running usage) keep vLLM's generator.

An answer with one choice is written in a callback of the event loop, which the engine's output
schedules. The task of the request waits for the last output only: to wake it for each token would
resume each layer between the socket and the engine, of which there are about twenty-five.
"""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.generate.base.serving import build_spec_decoding_metrics
from vllm.entrypoints.openai.chat_completion import serving as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.exceptions import GenerationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser.abstract_parser import DelegatingParser
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.concurrency import DONE, Begun
from server.request import context as requests

log = logging.getLogger("saccade.stream")

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
_vllms = OpenAIServingChat.chat_completion_stream_generator


Streams = dict[type[OpenAIServingChat], type["TextStream"]]


def install(streams: Streams) -> None:
    """Let chats be streamed here whose route says so in the `RequestContext`, by the class for
    their serving class in `streams`. Other routes (`/invocations`, those of plugins) and other
    serving classes read the events of vLLM's generator."""
    route: Any = OpenAIServingChat
    route.chat_completion_stream_generator = functools.partialmethod(_stream, streams)


def _stream(
    serving: OpenAIServingChat,
    streams: Streams,
    request: ChatCompletionRequest,
    result_generator: AsyncIterator[RequestOutput],
    request_id: str,
    model_name: str,
    conversation: list[Any],
    tokenizer: Any,
    request_metadata: RequestResponseMetadata,
    chat_template_kwargs: dict[str, Any] | None = None,
    mm_token_counts: dict[str, int] | None = None,
) -> "AsyncGenerator[str, None] | TextStream":
    """In the place of the method of `OpenAIServingChat`."""
    stream = streams.get(type(serving))
    if (
        stream is not None
        and requests.current().writes_text
        and stream.fits(serving, request)
        and is_text_alone(serving, request)
    ):
        return stream(
            serving,
            request,
            result_generator,
            request_id,
            model_name,
            request_metadata,
            mm_token_counts,
        )
    return _vllms(
        serving,
        request,
        result_generator,
        request_id,
        model_name,
        conversation,
        tokenizer,
        request_metadata,
        chat_template_kwargs=chat_template_kwargs,
        mm_token_counts=mm_token_counts,
    )


def is_text_alone(serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
    """Whether the chunks of the answer hold text and nothing else."""
    return (
        (serving.parser_cls is None or _passes_text(serving.parser_cls, request))
        and not serving.enable_log_outputs
        and not serving.enable_per_request_metrics
        and not request.use_beam_search
        and not request.logprobs
        and not request.echo
        and not request.return_token_ids
        and not request.return_prompt_text
    )


def _passes_text(parser: Any, request: ChatCompletionRequest) -> bool:
    """Whether vLLM's parser passes the text of the answer on as it is: it looks for tool calls
    only, and the request has no tools."""
    return (
        DelegatingParser in parser.__bases__
        and parser.reasoning_parser_cls is None
        and not parser.tool_parser_cls.engine_based_streaming
        and request.tool_choice == "none"
        and request.include_reasoning
    )


class TextStream:
    """The events of one answer, which may have several choices."""

    def __init__(
        self,
        serving: OpenAIServingChat,
        request: ChatCompletionRequest,
        outputs: AsyncIterator[RequestOutput],
        request_id: str,
        model_name: str,
        metadata: RequestResponseMetadata,
        mm_token_counts: dict[str, int] | None,
    ) -> None:
        self._serving = serving
        self._request = request
        self._outputs: Any = outputs
        self._id = request_id
        self._model = model_name
        self._metadata = metadata
        self._mm_token_counts = mm_token_counts
        self._created = int(time.time())
        self._with_usage, _ = should_include_usage(
            request.stream_options, serving.enable_force_include_usage
        )
        # vLLM's parsers leave out what has no text.
        self._without_empty = serving.parser_cls is not None
        self._choices: list[TextChoice] = []
        self._keep_text: Callable[[int, str], None] | None = None
        self._last: RequestOutput | None = None
        self._cached: tuple[int | None, int | None] = (None, None)
        self._write: Callable[[bytes, bool], Awaitable[None]]
        self._complete: Callable[[dict[str, Any]], None]
        self._queue: RequestOutputCollector | None = None
        self._waits = False  # for an output; other outputs may be written meanwhile
        self._next: RequestOutput | None = None  # to be written in the callback
        self._unfinished: asyncio.Task[None] | None = None  # the writing, which waits for room
        self._failure: Exception | None = None  # of the writing in the callback

    @staticmethod
    def fits(serving: OpenAIServingChat, request: ChatCompletionRequest) -> bool:
        """Whether the events have no more in them than the text: no running usage."""
        forced = serving.enable_force_include_usage
        return not should_include_usage(request.stream_options, forced)[1]

    async def write(
        self,
        write: Callable[[bytes, bool], Awaitable[None]],
        complete: Callable[[dict[str, Any]], None],
        *,
        in_callback: bool,
    ) -> None:
        """Call `write` with one or several events as they come, and whether more follow. With
        `in_callback`, it may be called outside of the current task. `complete` may change the event
        with the usage before it is written."""
        self._write, self._complete = write, complete
        context = requests.current()
        if context.grounding is not None:
            self._keep_text = context.keep_text
        if in_callback and (self._request.n or 1) == 1:
            context.on_queue = self._follow
        last = b""  # events, when the engine has finished
        try:
            while True:
                output, events = await self._next_events()
                if self._failure is not None:
                    raise self._failure
                if self._unfinished is not None:
                    await self._unfinished
                    self._unfinished = None
                if output is None:
                    break
                if output.finished:
                    last = events
                elif events:
                    await write(events, True)
            await write(last + events, False)
        finally:
            self._waits = False
            context.on_queue = None
            if self._unfinished is not None:
                self._unfinished.cancel()
            if self._queue is not None:
                del self._queue.put  # else the two would refer to each other
            await self._outputs.aclose()

    async def _next_events(self) -> tuple[RequestOutput | None, bytes]:
        """The next output that is not written in the callback, and its events; None and the last
        events when there are no more outputs."""
        self._waits = True
        try:
            output = await self._outputs.__anext__()
            return output, self._events(output)
        except StopAsyncIteration:
            return None, self._end()
        except GenerationError as error:
            failure = self._serving._convert_generation_error_to_streaming_response(error)
        except Exception as error:
            if self._failure is None:
                log.exception("failed to stream the answer to request %s", self._id)
            failure = self._serving.create_streaming_error_response(error)
        finally:
            self._waits = False
        return None, self._failed(b"data: " + failure.encode() + b"\n\n")

    # ------------------------------------------------------------------ outputs as they come

    def _follow(self, queue: RequestOutputCollector) -> None:
        """Take what vLLM puts into `queue`."""
        self._queue = queue
        queue.put = self._put  # type: ignore[method-assign]

    def _put(self, output: Any) -> None:
        """In the place of `put` of the queue. What it leaves in the queue wakes the task."""
        assert self._queue is not None
        waiting = self._next
        if not self._waits or not isinstance(output, RequestOutput):
            RequestOutputCollector.put(self._queue, output)
        elif waiting is not None:
            waiting.add(output, aggregate=True)
            if waiting.finished:
                self._next = None
                RequestOutputCollector.put(self._queue, waiting)
        elif output.finished:
            RequestOutputCollector.put(self._queue, output)
        else:
            self._next = output
            asyncio.get_running_loop().call_soon(self._write_next)

    def _write_next(self) -> None:
        output, self._next = self._next, None
        if output is None or not self._waits:
            return
        try:
            events = self._events(output)
            if not events or (writing := self._write(events, True)) is DONE:
                return
            step = Begun(writing)
            if not step.begin():
                self._unfinished = asyncio.create_task(_rest(step))
                self._waits = False
        except Exception as error:
            self._failure = error
            self._waits = False
            self._put(error)

    def _events(self, output: RequestOutput) -> bytes:
        """The events that tell of `output`."""
        events = [] if self._choices else self._begin(output)
        self._last = output
        for part in output.outputs:
            choice = self._choices[part.index]
            if choice.is_over:
                continue
            if part.finish_reason == "error":
                self._serving._raise_if_error(part.finish_reason, self._id)
            text, tokens = part.text, len(part.token_ids)
            if not text and not tokens and not choice.tokens:
                continue  # a part of the prompt was computed
            choice.tokens += tokens
            if self._keep_text is not None:
                self._keep_text(part.index, text)
            choice.is_over = part.finish_reason is not None
            events += self._events_of(choice, part)
        return b"".join(events)

    def _events_of(self, choice: "TextChoice", part: CompletionOutput) -> Sequence[bytes]:
        """The events, in pieces, that tell of the next part of a choice."""
        is_left_out = self._without_empty and not part.text
        delta = b"{}" if is_left_out else b'{"content":%b}' % _encode(part.text)
        if part.finish_reason is not None:
            reasons = _encode(part.finish_reason), _encode(part.stop_reason)
            return choice.head, delta, self._last_tail(*reasons)
        return () if is_left_out else (choice.head, delta, choice.tail)

    def _begin(self, output: RequestOutput) -> list[bytes]:
        """Prepare what is equal in all events; returns those that give the role."""
        self._cached = output.num_cached_tokens, output.num_cache_creation_tokens
        head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":'
            b'[{"index":'
        ) % (_encode(self._id), self._created, _encode(self._model))
        self._choices = [TextChoice(head, index) for index in range(self._request.n or 1)]
        role = _encode(self._serving.get_chat_request_role(self._request))
        return [
            b'%b%d,"delta":{"role":%b,"content":""},"logprobs":null,"finish_reason":null}],'
            b'"prompt_token_ids":null,"prompt_text":null}\n\n' % (head, index, role)
            for index in range(len(self._choices))
        ]

    def _last_tail(self, finish_reason: bytes, stop_reason: bytes) -> bytes:
        """The end of the last event of a choice, after its delta."""
        fingerprint = self._serving.system_fingerprint
        of_server = b""
        if fingerprint is not None and not self._with_usage:
            of_server = b',"system_fingerprint":' + _encode(fingerprint)
        return b',"logprobs":null,"finish_reason":%b,"stop_reason":%b,"token_ids":null}]%b}\n\n' % (
            finish_reason,
            stop_reason,
            of_server,
        )

    def _end(self) -> bytes:
        """The last events: the usage, if it is asked for."""
        usage = self._usage()
        if not self._with_usage:
            return _DONE
        of_prompt = self._details_of_prompt()
        event = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [],
            "usage": usage | _given(prompt_tokens_details=_dumped(of_prompt)),
            **_given(system_fingerprint=self._serving.system_fingerprint, metrics=self._metrics()),
        }
        self._complete(event)
        return b"data: %b\n\n%b" % (_encode(event), _DONE)

    def _failed(self, event: bytes) -> bytes:
        """The last events, of which `event` tells of a failure."""
        return event + _DONE

    def _usage(self) -> dict[str, Any]:
        """The tokens of the prompt and of the answer, of which vLLM is told, too."""
        last, prompt_tokens = self._last, 0
        if last is not None:
            in_encoder = last.encoder_prompt_token_ids or ()
            prompt_tokens = len(last.prompt_token_ids or ()) + len(in_encoder)
        completion_tokens = sum(choice.tokens for choice in self._choices)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }
        self._metadata.final_usage_info = UsageInfo.model_construct(**usage)
        return usage

    def _details_of_prompt(self) -> PromptTokenUsageInfo | None:
        return chat._make_prompt_tokens_details(
            self._serving.enable_prompt_tokens_details, *self._cached, self._mm_token_counts
        )

    def _metrics(self) -> dict[str, Any] | None:
        """What vLLM tells of speculative decoding; None without it."""
        found = build_spec_decoding_metrics(self._last) if len(self._choices) == 1 else None
        return None if found is None else {"speculative_decoding": _dumped(found)}


async def _rest(step: Begun[None]) -> None:
    await step.rest()


def _given(**fields: Any) -> dict[str, Any]:
    """Those that are not None, which vLLM leaves out of this event."""
    return {name: value for name, value in fields.items() if value is not None}


def _dumped(model: BaseModel | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump(exclude_unset=True, exclude_none=True)


class TextChoice:
    """What is known of one choice.

    Attributes:
        head, tail: what is before and after the delta in all its events but the first and the last.
        tokens: how many were generated so far.
        is_over: its last event is written.
    """

    __slots__ = ("head", "is_over", "tail", "tokens")

    def __init__(self, head: bytes, index: int) -> None:
        self.head = b'%b%d,"delta":' % (head, index)
        self.tail = b',"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        self.tokens = 0
        self.is_over = False
