"""Checks the parameters of a request that vLLM's routes pass to its engine unchecked.

vLLM verifies constraints on the output on the event loop: xgrammar parses a schema, a regular
expression may take seconds. Here that happens in a thread, after the limits on their cost.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.constraint_cost import check_choices, check_pattern, check_schema
from server.engine.heartbeat import Heartbeat
from server.engine.vllm_adapter.stall import EngineStalled
from server.errors import ClientError, Unavailable
from server.request import context as requests
from server.request.context import RequestContext
from server.settings import ConstraintSettings

log = logging.getLogger("saccade.engine")

# Parameters by which the engine's connectors find what another engine has computed.
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
# Where in its sources a compiler of grammars found the error, and its checks of itself.
_SOURCE = re.compile(r"\[[\d:]+\] \S+:\d+: |Check failed.*|.*get<type>\(\).*", re.DOTALL)


class Parameters:
    """Wraps `generate` and `add_request` of an engine."""

    def __init__(self, engine: AsyncLLM, limits: ConstraintSettings, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._limits = limits
        self._config = engine.vllm_config
        self._tokenizer = engine.renderer.get_tokenizer
        self._threads = ThreadPoolExecutor(2, "constraints")
        self._generate = engine.generate
        self._add_request = engine.add_request
        wrapped: Any = engine
        wrapped.generate = self.generate
        wrapped.add_request = self.add_request

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's, after the checks that take no time: a stream has not begun yet.

        Raises:
            VLLMValidationError: a parameter is invalid, or a constraint exceeds a limit.
            Unavailable: the engine has not answered for long; the request would hang.
        """
        if self._heartbeat.stalled:
            raise Unavailable("the engine does not answer")
        try:
            self._check(sampling_params)
        except VLLMValidationError as error:
            note(error)
            raise
        return self._generate(prompt, sampling_params, *args, **options)

    async def add_request(self, request_id: str, prompt: Any, params: Any, **options: Any) -> Any:
        """vLLM's, after the constraint was verified in a thread. The request is told of its queue.

        Raises:
            VLLMValidationError: the constraint is invalid.
            EngineStalled: the engine has not answered for long; the request would hang.
        """
        if self._heartbeat.stalled:  # since `generate` was called
            raise EngineStalled
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            loop = asyncio.get_running_loop()
            name = requests.current().constraint
            try:
                await loop.run_in_executor(self._threads, self._verify, params, name)
            except VLLMValidationError as error:
                note(error)
                raise
        queue = await self._add_request(request_id, prompt, params, **options)
        context = requests.current()
        if (on_queue := context.on_queue) is not None:
            context.on_queue = None
            on_queue(queue)
        return queue

    def _check(self, params: SamplingParams) -> None:
        for name in _TRANSFERS:
            value = (params.extra_args or {}).get(name)
            if value is not None and not isinstance(value, dict):
                raise VLLMValidationError(f"{name} must be an object", parameter=name)
        if (constraint := params.structured_outputs) is None:
            return
        try:
            check_cost(constraint, self._limits, requests.current().constraint)
        except ClientError as error:  # vLLM passes on only its own errors
            raise VLLMValidationError(error.message, parameter=error.param) from None

    def _verify(self, params: SamplingParams, name: str) -> None:
        """What vLLM does with a constraint before it sends the request, so that it need not do
        it again."""
        model, config = self._config.model_config, self._config.structured_outputs_config
        verified: Any = params
        try:
            verified._validate_structured_outputs(model, config, self._tokenizer())
        except Exception as error:
            log.info("a constraint on the output is invalid: %r", error)
            raise VLLMValidationError(_reason(error), parameter=name) from None
        verified._validate_structured_outputs = _nothing


def _nothing(*_: object) -> None:
    """In the place of a verification that is over."""


def check_cost(constraint: StructuredOutputsParams, limits: ConstraintSettings, name: str) -> None:
    """Check what a constraint costs. Raises ClientError if it exceeds a limit."""
    for schema in (constraint.json, constraint.structural_tag):
        if schema is not None:
            check_schema(schema, limits, name)
    for pattern in (constraint.regex, constraint.grammar):
        if pattern is not None:
            check_pattern(pattern, limits, name)
    if constraint.choice is not None:
        check_choices(constraint.choice, limits, name)


def _reason(error: Exception) -> str:
    """The text for the client: vLLM's, without what only its libraries' authors understand."""
    if not isinstance(error, VLLMClientError):
        return "the constraint on the output is not valid"
    text = error.args[0] if error.args else ""
    return _SOURCE.sub("", str(text)).strip(" :") or "the constraint on the output is not valid"


def note(error: VLLMValidationError) -> None:
    """Keep the error of the current request: vLLM loses it in streams of messages."""
    text = str(error.args[0]) if error.args else ""
    requests.current().record.refusal = ClientError(text, param=error.parameter)


def impossible(context: RequestContext) -> VLLMValidationError:
    """The error for a constraint that the engine could not follow."""
    text = (
        "the model cannot follow the constraint on the output: it allows no text, or leads to a "
        "point after which nothing is allowed"
    )
    context.record.refusal = ClientError(text, param=context.constraint)
    return VLLMValidationError(text, parameter=context.constraint)
