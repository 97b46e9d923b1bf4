"""Streams of vLLM's serving classes without an engine: what it would say, and what vLLM writes."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.engine.arguments import DEMO_MODEL
from server.engine.vllm_adapter import text_stream
from server.request.context import RequestContext

TOKENIZER = get_tokenizer(str(DEMO_MODEL))
COUNTS = {"image": 49}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # no lone surrogates
STEPS = st.lists(st.tuples(TEXT, st.lists(st.integers(0, 9), max_size=3)), max_size=5)
REASONS = st.sampled_from([("stop", None), ("stop", "end"), ("stop", 7), ("length", None)])


def serving_with(**options: Any) -> OpenAIServingChat:
    """vLLM's serving class, with what its streams read of it."""
    made = object.__new__(OpenAIServingChat)
    known = {
        "parser_cls": None,
        "enable_force_include_usage": False,
        "enable_prompt_tokens_details": False,
        "enable_per_request_metrics": False,
        "enable_log_outputs": False,
        "request_logger": None,
        "system_fingerprint": None,
        "response_role": "assistant",
        "model_config": None,
        "_include_reasoning_tokens_details": False,
    }
    made.__dict__.update({**known, **options})
    return made


def output(
    *parts: tuple[int, str, Sequence[int], str | None, int | str | None], finished: bool = False
) -> RequestOutput:
    """What the engine says in one step; of each choice its index, text, tokens and reasons."""
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1, 2, 3],
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index, text, list(tokens), None, None, finish_reason=finish, stop_reason=stop
            )
            for index, text, tokens, finish, stop in parts
        ],
        finished=finished,
        num_cached_tokens=2,
        num_cache_creation_tokens=1,
    )


class Engine:
    """Gives `outputs` as vLLM's engine does, through its queue; an exception is raised."""

    def __init__(self, outputs: Sequence[RequestOutput | Exception], *, together: bool) -> None:
        self._outputs = copy.deepcopy(list(outputs))
        self._together = together

    async def generate(self, context: RequestContext) -> AsyncIterator[RequestOutput]:
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        if context.on_queue is not None:
            context.on_queue(queue)
        producing = asyncio.create_task(self._produce(queue))
        finished = False
        while not finished:
            found = queue.get_nowait() or await queue.get()
            assert isinstance(found, RequestOutput)
            finished = found.finished
            yield found
        await producing

    async def _produce(self, queue: RequestOutputCollector) -> None:
        for each in self._outputs:
            queue.put(each)  # type: ignore[arg-type]
            if not self._together:
                for _ in range(8):  # until it is written
                    await asyncio.sleep(0)


def vllms_chunks(
    serving: Any, request: ChatCompletionRequest, outputs: Sequence[RequestOutput | Exception]
) -> AsyncIterator[str]:
    """The events that vLLM's generator makes of a chat."""

    async def given() -> AsyncIterator[RequestOutput]:
        for each in copy.deepcopy(list(outputs)):
            if isinstance(each, Exception):
                raise each
            yield each

    return text_stream._vllms(
        serving,
        request,
        given(),
        "chatcmpl-1",
        "m",
        [],
        TOKENIZER,
        RequestResponseMetadata(request_id="r"),
        mm_token_counts=COUNTS,
    )


def events_of(make: Callable[[], AsyncIterator[str]]) -> list[str]:
    """All events of a stream, without the blank lines between them."""

    async def run() -> list[str]:
        return [event.removesuffix("\n\n") async for event in make()]

    return asyncio.run(run())
