"""Streams of text that are written without vLLM's models hold the events that vLLM would write."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import RequestOutput
from vllm.parser import ParserManager
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

from server.concurrency import DONE
from server.engine.vllm_adapter.text_stream import TextStream, is_text_alone
from server.request.context import RequestContext, entered
from server.telemetry.record import Record
from tests.streams import (
    COUNTS,
    REASONS,
    STEPS,
    TEXT,
    Engine,
    events_of,
    output,
    serving_with,
    vllms_chunks,
)

HERMES = ParserManager.get_parser("hermes", enable_auto_tools=True)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def request_with(**options: Any) -> ChatCompletionRequest:
    message = {"role": "user", "content": "?"}
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [message], "stream": True, **options}
    )


Write = Callable[[bytes, bool], Awaitable[None]]


def ours(
    serving: OpenAIServingChat,
    request: ChatCompletionRequest,
    outputs: Sequence[RequestOutput | Exception],
    *,
    together: bool = False,
    in_callback: bool = True,
    writer: Callable[[list[bytes]], Write] | None = None,
) -> list[str]:
    """The events that `TextStream` writes."""

    async def run() -> list[str]:
        written: list[bytes] = []
        ended: list[bool] = []

        def at_once(events: bytes, more: bool) -> Awaitable[None]:
            ended.append(not more)
            written.append(events)
            return DONE

        context = RequestContext(Record())
        with entered(context):
            engine = Engine(outputs, together=together)
            stream = TextStream(
                serving,
                request,
                engine.generate(context),
                "chatcmpl-1",
                "m",
                RequestResponseMetadata(request_id="r"),
                COUNTS,
            )
            write = at_once if writer is None else writer(written)
            await stream.write(write, lambda event: None, in_callback=in_callback)
        assert writer is not None or ended == [False] * (len(ended) - 1) + [True]
        assert context.on_queue is None
        return b"".join(written).decode().split("\n\n")[:-1]

    return asyncio.run(run())


def vllms(
    serving: OpenAIServingChat,
    request: ChatCompletionRequest,
    outputs: Sequence[RequestOutput | Exception],
) -> list[str]:
    """The events that vLLM's generator makes."""

    return events_of(lambda: vllms_chunks(serving, request, outputs))


def parsed(events: list[str]) -> list[Any]:
    data = [event.removeprefix("data: ") for event in events]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data[:-1]]
    for chunk in chunks:
        assert chunk.pop("created", 1) > 0
    return chunks


PARSERS = [None, "hermes", "pythonic"]
SERVINGS = st.fixed_dictionaries(
    {},
    optional={
        "enable_prompt_tokens_details": st.booleans(),
        "system_fingerprint": TEXT,
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "stream_options": st.none() | st.builds(dict, include_usage=st.booleans()),
        "add_generation_prompt": st.booleans(),
        "n": st.just(1),
    },
)


@given(STEPS, TEXT, REASONS, SERVINGS, REQUESTS, st.sampled_from(PARSERS))
def test_events_equal_vllms(
    steps: list[tuple[str, list[int]]],
    end: str,
    reasons: tuple[str, int | str | None],
    serving: dict[str, Any],
    request: dict[str, Any],
    parser: str | None,
) -> None:
    outputs = [output((0, *step, None, None)) for step in steps]
    outputs.append(output((0, end, [5], *reasons), finished=True))
    parser_class = ParserManager.get_parser(parser, enable_auto_tools=True)
    server = serving_with(**serving, parser_cls=parser_class)
    asked = request_with(**request)
    assert is_text_alone(server, asked)
    assert TextStream.fits(server, asked)
    written, expected = ours(server, asked, outputs), vllms(server, asked, outputs)
    assert parsed(written) == parsed(expected)


@given(st.lists(st.tuples(st.integers(0, 1), TEXT, st.integers(0, 2)), max_size=6))
def test_events_of_several_choices_equal_vllms(steps: list[tuple[int, str, int]]) -> None:
    outputs = [output((index, text, [1] * tokens, None, None)) for index, text, tokens in steps]
    outputs.append(output((1, "b", [5], "stop", None)))
    outputs.append(output((1, "late", [5], None, None), (0, "a", [], None, None)))
    outputs.append(output((0, "a", [6, 7], "length", None), finished=True))
    server, asked = serving_with(), request_with(n=2, stream_options={"include_usage": True})
    assert parsed(ours(server, asked, outputs)) == parsed(vllms(server, asked, outputs))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("error", [EngineDeadError(), ValueError("no such thing")])
def test_a_failure_is_the_event_that_vllm_writes(steps: int, error: Exception) -> None:
    outputs: list[RequestOutput | Exception] = [output((0, "a", [1], None, None))] * steps
    outputs.append(error)
    server, asked = serving_with(), request_with()
    written = parsed(ours(server, asked, outputs))
    assert written == parsed(vllms(server, asked, outputs))
    assert "error" in written[-1]


def test_a_fault_of_the_engine_is_the_event_that_vllm_writes() -> None:
    outputs = [
        output((0, "a", [1], None, None)),
        output((0, "", [], "error", None), finished=True),
    ]
    server, asked = serving_with(), request_with(stream_options={"include_usage": True})
    written = parsed(ours(server, asked, outputs))
    assert written == parsed(vllms(server, asked, outputs))
    assert written[-1]["error"]["message"] == "Internal server error"


@pytest.mark.parametrize("n", [1, 2])
def test_speculative_decoding_is_told_of_as_by_vllm(n: int) -> None:
    last = output((0, "a", [1, 2], "stop", None), finished=True)
    last.outputs[0].spec_decode_metrics = RequestSpecDecodeMetrics.new(3)
    last.outputs[0].spec_decode_metrics.observe(3, 2)
    server, asked = serving_with(), request_with(n=n, stream_options={"include_usage": True})
    written = parsed(ours(server, asked, [last]))
    assert written == parsed(vllms(server, asked, [last]))
    assert ("metrics" in written[-1]) == (n == 1)


def texts(events: list[str]) -> list[str]:
    chunks = parsed(events)
    return [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_is_ready_together_is_written_together(steps: int) -> None:
    outputs = [output((0, str(step), [step], None, None)) for step in range(steps)]
    outputs.append(output((0, "end", [9], "stop", None), finished=True))
    asked = request_with(stream_options={"include_usage": True})
    events = ours(serving_with(), asked, outputs, together=True)
    assert texts(events) == ["", "".join(map(str, range(steps))) + "end"]
    assert parsed(events)[-1]["usage"]["completion_tokens"] == steps + 1


@pytest.mark.parametrize("in_callback", [True, False])
def test_a_slow_client_gets_everything_in_order(in_callback: bool) -> None:
    def slow(written: list[bytes]) -> Write:
        async def write(events: bytes, more: bool) -> None:
            for _ in range(3 + 20 * (len(written) % 3)):  # the engine goes on meanwhile
                await asyncio.sleep(0)
            written.append(events)

        return write

    outputs = [output((0, f"{step} ", [step], None, None)) for step in range(40)]
    outputs.append(output((0, "end", [9], "stop", None), finished=True))
    asked = request_with()
    events = ours(serving_with(), asked, outputs, writer=slow, in_callback=in_callback)
    assert "".join(texts(events)) == "".join(f"{step} " for step in range(40)) + "end"
    assert 3 < len(texts(events)) < 40


def test_what_waited_for_room_is_written_before_the_next_output() -> None:
    async def run() -> None:
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        written: list[bytes] = []
        begun, has_room = asyncio.Event(), asyncio.Event()
        context = RequestContext(Record())

        async def outputs() -> AsyncIterator[RequestOutput]:
            assert context.on_queue is not None
            context.on_queue(queue)
            while True:
                found = await queue.get()
                assert isinstance(found, RequestOutput)
                yield found

        async def write(events: bytes, more: bool) -> None:
            begun.set()
            await has_room.wait()
            written.append(events)

        with entered(context):
            stream = TextStream(
                *(serving_with(), request_with(), outputs(), "chatcmpl-1", "m"),
                *(RequestResponseMetadata(request_id="r"), COUNTS),
            )
            writing = asyncio.create_task(stream.write(write, lambda event: None, in_callback=True))
            while "put" not in vars(queue):
                await asyncio.sleep(0)
            queue.put(output((0, "a", [1], None, None)))
            await begun.wait()
            has_room.set()
            while not written:
                await asyncio.sleep(0)
            assert b'"content":"a"' in written[0]
            writing.cancel()
            await asyncio.wait([writing])

    asyncio.run(asyncio.wait_for(run(), 60))


def test_only_the_task_of_the_request_writes_if_it_must() -> None:
    writers = set()

    def noting(written: list[bytes]) -> Write:
        def write(events: bytes, more: bool) -> Awaitable[None]:
            writers.add(asyncio.current_task())
            written.append(events)
            return DONE

        return write

    steps = [output((0, str(step), [step], None, None)) for step in range(3)]
    steps.append(output((0, "end", [9], "stop", None), finished=True))
    server, asked = serving_with(), request_with()
    found = ours(server, asked, steps, writer=noting, in_callback=False)
    assert parsed(found) == parsed(vllms(server, asked, steps))
    assert len(writers) == 1
    ours(server, asked, steps, writer=noting)
    assert None in writers


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("more", [True, False], ids=["in the middle", "at the end"])
def test_a_failure_to_write_is_raised(more: bool, at_once: bool) -> None:
    def broken(written: list[bytes]) -> Write:
        async def write(events: bytes, more_: bool) -> None:
            if more_ is more:
                if not at_once:
                    await asyncio.sleep(0)
                raise OSError("gone")

        return write

    last = output((0, "b", [2], "stop", None), finished=True)
    outputs = [output((0, "a", [1], None, None)), last]
    with pytest.raises(OSError, match="gone"):
        ours(serving_with(), request_with(), outputs, writer=broken)


@pytest.mark.parametrize(
    ("serving", "request_"),
    [
        ({"parser_cls": ParserManager.get_parser(None, "qwen3")}, {}),
        ({"parser_cls": ParserManager.get_parser("hermes", "deepseek_r1", True)}, {}),
        ({"parser_cls": HERMES}, {"tools": [TOOL]}),
        ({"parser_cls": HERMES}, {"tools": [TOOL], "tool_choice": "required"}),
        ({"parser_cls": HERMES}, {"include_reasoning": False}),
        ({"enable_log_outputs": True}, {}),
        ({"enable_per_request_metrics": True}, {}),
        ({"enable_force_include_usage": True}, {}),
        ({}, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
        ({}, {"use_beam_search": True}),
        ({}, {"logprobs": True}),
        ({}, {"echo": True}),
        ({}, {"return_token_ids": True}),
        ({}, {"return_prompt_text": True}),
    ],
)
def test_a_stream_with_more_than_text_is_left_to_vllm(
    serving: dict[str, Any], request_: dict[str, Any]
) -> None:
    server, asked = serving_with(**serving), request_with(**request_)
    assert not (is_text_alone(server, asked) and TextStream.fits(server, asked))


def test_every_field_of_vllms_chunks_is_known() -> None:
    """A field that vLLM adds changes its JSON: `text_stream` must then be extended."""
    assert list(ChatCompletionResponseStreamChoice.model_fields) == [
        "index",
        "delta",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "token_ids",
    ]
    assert list(ChatCompletionStreamResponse.model_fields) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "system_fingerprint",
        "prompt_token_ids",
        "prompt_text",
        "metrics",
    ]
