"""Keeps apart what vLLM caches for different groups of API keys.

Two kinds of cached work outlive a request: prompts, by their tokens and a salt, and items (images,
videos, audio), by a hash or by the name that a client gave. Both get the group into their key: the
name where vLLM's processor decides on it, so that all its caches see the same one, and the salt
when the request is sent. What comes by another way, such as features with names of the client's
own, is renamed at sending too: no request reaches the engine with a name outside of its group.

Without groups nothing changes.
"""

import contextvars
import functools
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.vllm_adapter.processor_cache import SendRequest
from server.request import tenant


def keep_apart(engine: AsyncLLM) -> None:
    """Make every item and every request of `engine` one of the group that it is for.

    To be called after all else that looks at a request on its way to the engine core.
    """
    renderer = engine.renderer
    if renderer.mm_processor is not None:
        name_by_group(renderer.mm_processor)
        carry_context(renderer._mm_executor)
    core = engine.engine_core
    core.add_request_async = functools.partial(send_for_group, core.add_request_async)


def name_by_group(processor: Any) -> None:
    """Let the names that vLLM's `processor` gives to items be those of the current group."""
    hashes_of = processor._get_mm_hashes

    def named(inputs: Any) -> dict[str, list[str]]:
        hashes = hashes_of(inputs)
        return {modality: [tenant.own(name) for name in hashes[modality]] for modality in hashes}

    processor._get_mm_hashes = named


def carry_context(executor: Executor) -> None:
    """Let what is submitted to `executor` run in the context of its caller."""
    submit: Any = executor.submit

    def submit_in_context(work: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(contextvars.copy_context().run, work, *args, **kwargs)

    executor.submit = submit_in_context  # type: ignore[method-assign]


async def send_for_group(send: SendRequest, request: EngineCoreRequest) -> None:
    """Send `request` with the salt and the names of the current group."""
    if tenant.group():
        request.cache_salt = tenant.salt(request.cache_salt)
        if request.mm_features:
            request.mm_features = [_own(feature) for feature in request.mm_features]
    await send(request)


def _own(feature: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
    name = feature.mm_hash or feature.identifier
    own = tenant.own(name)
    if own == name:
        return feature
    return replace(feature, mm_hash=own, identifier=tenant.own(feature.identifier))
