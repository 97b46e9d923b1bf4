"""Notes what becomes of each request in the engine: when, how much, and which images were encoded.

Requests are followed from their sending to their last output, by what passes between the server and
the engine core. With the last output of a request, the embedding cache sends for which of its
images the encoder ran. That goes into the `RequestContext`, from which the answer is completed, and
not into the answer, where vLLM would put it.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args
from weakref import WeakValueDictionary

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.embedding_cache.scheduler import ENCODED
from server.engine.vllm_adapter.levels import Modality
from server.engine.vllm_adapter.parameters import impossible
from server.request.budgets import Item
from server.request.context import RequestContext
from server.telemetry.record import Prompt, Record
from server.telemetry.stages import Stage
from server.telemetry.tracing import is_untraced

log = logging.getLogger("saccade.engine")


class Outcomes:
    """Follows requests by their ids in the engine.

    Attributes:
        read_reports: called before the outputs of a step are read, so that `encoded` is told of the
            encoder runs of that step first.
    """

    def __init__(self) -> None:
        self.read_reports: Callable[[], None] = lambda: None
        self._contexts: WeakValueDictionary[str, RequestContext] = WeakValueDictionary()
        self._model = ""

    def follow(self, engine: AsyncLLM) -> None:
        """Read what comes out of `engine`. `sending` must be called for what goes into it."""
        names = engine.model_config.served_model_name or [engine.model_config.model]
        self._model = names if isinstance(names, str) else names[0]
        outputs = cast(Any, engine.output_processor)
        outputs.process_outputs = functools.partial(
            self._process, outputs.process_outputs, outputs.request_states
        )
        outputs.do_tracing = functools.partial(self._trace, outputs.do_tracing)

    def encoded(self, request_ids: Sequence[str], start: float, end: float) -> None:
        """The vision encoder ran for these requests."""
        for request_id in request_ids:
            if (context := self._contexts.get(request_id)) is not None:
                timeline = context.record.timeline
                timeline.encode(start, end)
                timeline.begin(Stage.PREFILL, start)  # as far as is known by now

    def sending(self, request: EngineCoreRequest, context: RequestContext) -> None:
        """`request` is about to be sent to the engine, on behalf of `context`."""
        record = context.record
        params = request.sampling_params
        context.is_constrained = bool(params and params.structured_outputs)
        self._contexts[request.request_id] = context
        name = request.external_req_id or request.request_id
        record.response_id = record.response_id or _answer_id(record, name)
        record.prompts[name] = _prompt(request)
        record.model = request.lora_request.lora_name if request.lora_request else self._model
        record.under_way.add(request.request_id)
        record.timeline.begin(Stage.ENGINE_QUEUE, time.monotonic())

    def _process(
        self,
        process: Callable[..., Any],
        states: dict[str, Any],
        outputs: Sequence[EngineCoreOutput],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # vLLM drops a state with its last output. Requests that were aborted have none.
        followed = [
            (output, states.get(output.request_id), self._contexts.get(output.request_id))
            for output in outputs
        ]
        if any(context is None or context.may_be_encoded for _, _, context in followed):
            self.read_reports()
        for output, state, context in followed:
            if output.ec_transfer_params and ENCODED in output.ec_transfer_params:
                note(context, output.ec_transfer_params[ENCODED])
                output.ec_transfer_params = None
            if output.finish_reason is FinishReason.ERROR and state is not None:
                _explain(output, state, context)
        result = process(outputs, *args, **kwargs)
        try:
            now = time.monotonic()
            for output, state, context in followed:
                if context is not None and state is not None:
                    over = output.request_id not in states
                    _follow(context, output, state, now, over=over)
        except Exception:  # raised here, it would end the engine
            log.exception("failed to record the progress of requests")
        return result

    def _trace(
        self, trace: Callable[..., None], output: EngineCoreOutput, *args: Any, **kwargs: Any
    ) -> None:
        """Let vLLM make its span of a request that has ended, unless the request is not sampled:
        vLLM would find that out only after it has made the span."""
        context = self._contexts.get(output.request_id)
        if context is None or not is_untraced(context.record):
            trace(output, *args, **kwargs)


def _explain(output: EngineCoreOutput, state: Any, context: RequestContext | None) -> None:
    """Report the failure of a request as the client's error, where its constraint on the output
    caused it: the engine cannot compile it, or it rejected the tokens."""
    if context is None or state.queue is None or not context.is_constrained:
        return
    if output.new_token_ids or not context.media:  # else media may be what failed
        state.queue.put(impossible(context))


def _follow(
    context: RequestContext, output: EngineCoreOutput, state: Any, now: float, *, over: bool
) -> None:
    """Note one step's output of a request, and give back what it no longer needs."""
    if not context.record.timeline.began(Stage.GENERATE):
        context.holdings.give_back(Item.FEATURES)  # the engine has encoded the images
    _advance(context.record, output, state, now, over=over)
    if over and context.permit is not None:
        context.permit.leave_engine(output.request_id)


def _advance(
    record: Record, output: EngineCoreOutput, state: Any, now: float, *, over: bool
) -> None:
    """Note one step's output of a request; `state` is vLLM's, whose statistics are None where
    they are turned off."""
    timeline = record.timeline
    record.completion_tokens += len(output.new_token_ids)
    if not timeline.began(Stage.GENERATE):
        if state.stats is not None:
            scheduled, first = state.stats.scheduled_ts, state.stats.first_token_ts
            if timeline.start <= scheduled <= first <= now:  # the clock of this machine
                timeline.begin_again(Stage.PREFILL, scheduled)
                timeline.begin(Stage.FIRST_TOKEN, first)
        timeline.begin(Stage.GENERATE, now)
    if over:
        record.under_way.discard(output.request_id)
        if not record.under_way:
            timeline.begin_again(Stage.RESPOND, now)
        # vLLM looks for stop strings itself, and does not say so in the output.
        record.finish_reason = str(output.finish_reason or FinishReason.STOP)


# What processors call an image.
_IMAGES = get_args(Modality)


def _answer_id(record: Record, name: str) -> str:
    """The id of the answer that the client sees, of the engine's name for one of its prompts."""
    if record.path == "/v1/completions":
        return name.rpartition("-")[0]
    return name.rpartition("_")[0] if record.path == "/v1/responses" else name


def _prompt(request: EngineCoreRequest) -> Prompt:
    media = [each for each in request.mm_features or () if each.modality in (*_IMAGES, "video")]
    tokens = sum(each.mm_position.get_num_embeds() for each in media)
    images = sum(each.modality in _IMAGES for each in media)
    return Prompt(len(request.prompt_token_ids or ()), images, tokens)


def note(request: RequestContext | None, encoded: Sequence[bool]) -> None:
    """Add what one of the answers to `request` says; one prompt may have several answers."""
    if request is None:
        return
    before = request.encoded or [False] * len(encoded)
    if len(before) == len(encoded):
        request.encoded = [a or b for a, b in zip(before, encoded, strict=True)]
