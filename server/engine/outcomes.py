"""Tells each request for which of its images the encoder ran.

The embedding cache sends it with the last output of a request; here it goes into the
`ImageRequest`, from which the answer is completed, and not into the answer as vLLM would have it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.cache import SendRequest
from server.engine.embedding_cache.scheduler import ENCODED
from server.media import request as requests
from server.media.request import ImageRequest

Sent = WeakValueDictionary[str, ImageRequest]


def follow(engine: AsyncLLM) -> None:
    """Look at what goes into `engine`, and at what comes out of it."""
    sent: Sent = WeakValueDictionary()
    core, outputs = engine.engine_core, cast(Any, engine.output_processor)
    core.add_request_async = functools.partial(_send, sent, core.add_request_async)
    outputs.process_outputs = functools.partial(_process, sent, outputs.process_outputs)


async def _send(sent: Sent, send: SendRequest, request: EngineCoreRequest) -> None:
    if request.mm_features:
        sent[request.request_id] = requests.current()
    await send(request)


def _process(
    sent: Sent,
    process: Callable[..., Any],
    outputs: Sequence[EngineCoreOutput],
    *args: Any,
    **kwargs: Any,
) -> Any:
    for output in outputs:
        if output.ec_transfer_params and ENCODED in output.ec_transfer_params:
            note(sent.get(output.request_id), output.ec_transfer_params[ENCODED])
            output.ec_transfer_params = None
    return process(outputs, *args, **kwargs)


def note(request: ImageRequest | None, encoded: Sequence[bool]) -> None:
    """Add what one of the answers to `request` tells; there may be several to one prompt."""
    if request is None:
        return
    before = request.encoded or [False] * len(encoded)
    if len(before) == len(encoded):
        request.encoded = [a or b for a, b in zip(before, encoded, strict=True)]
