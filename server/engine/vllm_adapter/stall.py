"""Ends requests whose engine does not answer: it hangs, was stopped, or has ended."""

from collections.abc import Callable
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

# The beginning of the message by which `http/errors.py` knows the error.
MESSAGE = "EngineCore does not answer"


class EngineStalled(EngineDeadError):
    """The engine has not answered for long. A subclass, since vLLM passes only such an error on as
    it is."""

    def __init__(self) -> None:
        Exception.__init__(self, MESSAGE)


async def fail_requests(
    engine: AsyncLLM, make_error: Callable[[], EngineDeadError] = EngineStalled
) -> None:
    """Fail all requests that the engine has, and drop them there in case that it goes on."""
    outputs: Any = engine.output_processor
    states = outputs.request_states
    for state in list(states.values()):
        if state.queue is not None:
            state.queue.put(make_error())
    await engine.abort([*outputs.parent_requests, *states], internal=True)


async def fail_request(engine: AsyncLLM, request_id: str, error: EngineDeadError) -> None:
    """Fail one of the engine's requests with `error`, and its other answers if `n` is above 1."""
    outputs: Any = engine.output_processor
    if (state := outputs.request_states.get(request_id)) is None:
        return
    if state.queue is not None:
        state.queue.put(error)
    parent = state.parent_req
    await engine.abort(request_id if parent is None else parent.request_id, internal=True)
