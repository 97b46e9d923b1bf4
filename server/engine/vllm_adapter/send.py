"""The way of every request from the server to vLLM's engine core, on one screen: `Sender.send`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.processor_cache import ProcessorCache
from server.request import context as requests
from server.request.groups import prefixed, salted


class Gate:
    """Lets requests pass, `async with` it, unless it is closed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._passing = 0
        self._all_passed = asyncio.Event()

    async def __aenter__(self) -> None:
        while not self._open.is_set():
            await self._open.wait()
        self._passing += 1

    async def __aexit__(self, *_: object) -> None:
        self._passing -= 1
        if not self._passing:
            self._all_passed.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nothing passes in the body; requests that arrive wait."""
        while not self._open.is_set():
            await self._open.wait()
        self._open.clear()
        try:
            while self._passing:
                self._all_passed.clear()
                await self._all_passed.wait()
            yield
        finally:
            self._open.set()


class Sender:
    """Takes the place of `add_request_async` of vLLM's engine core client."""

    def __init__(
        self, engine: AsyncLLM, cache: ProcessorCache | None, outcomes: Outcomes, gate: Gate
    ) -> None:
        self._cache = cache
        self._outcomes = outcomes
        self._gate = gate
        self._engine = engine
        outputs: Any = engine.output_processor
        self._states = outputs.request_states
        self.attach()

    def attach(self) -> None:
        """Take the place in the client of the core that the engine has now."""
        core: Any = self._engine.engine_core
        self._send_to_core = core.add_request_async
        core.add_request_async = self.send

    async def send(self, request: EngineCoreRequest) -> None:
        """Send `request` for the request of the client that the current task works for.

        Raises:
            RetryableRequestError: see `Settled`.
            EngineDeadError: the request has failed with the engine while it waited here.
        """
        context = requests.current()
        is_followed = request.request_id in self._states
        try:
            if context.permit is not None:
                await context.permit.enter_engine(request.request_id)
            async with self._gate:
                if is_followed and request.request_id not in self._states:
                    raise EngineDeadError  # else the engine would work for nobody
                keep_in_group(request, context.group)
                self._outcomes.sending(request, context)
                if self._cache is None or not request.mm_features:
                    await self._send_to_core(request)
                    return
                async with self._cache.settled(request, last=self._is_last(request)):
                    await self._send_to_core(request)
        except BaseException:  # vLLM keeps what it knows of a request that it could not send
            await self._engine.abort(self._parent_id(request), internal=True)
            raise

    def _parent_id(self, request: EngineCoreRequest) -> str:
        """The id of `request`, or that of all answers to its prompt if `n` is above 1."""
        state = self._states.get(request.request_id)
        parent = state.parent_req if state is not None else None
        return request.request_id if parent is None else str(parent.request_id)

    def _is_last(self, request: EngineCoreRequest) -> bool:
        """Whether no other request follows with the same features, as with `n` above 1."""
        state = self._states.get(request.request_id)
        parent = state.parent_req if state is not None else None
        return parent is None or state.request_index == parent.sampling_params.n - 1


def keep_in_group(request: EngineCoreRequest, group: str) -> None:
    """Keep apart what vLLM caches for different groups of API keys.

    Two kinds of cached work outlive a request: prompts, by their tokens and a salt, and items
    (images, videos, audio), by a hash or by the name that a client gave. Both get the group into
    their key. Most items have it already, from the processor (`group_names.name_by_group`), so that
    all of vLLM's caches see the same name; features with names of the client's own get it here.
    Without groups nothing changes.
    """
    if not group:
        return
    request.cache_salt = salted(request.cache_salt, group)
    if request.mm_features:
        request.mm_features = [_in_group(feature, group) for feature in request.mm_features]


def _in_group(feature: MultiModalFeatureSpec, group: str) -> MultiModalFeatureSpec:
    name = feature.mm_hash or feature.identifier
    if (ours := prefixed(name, group)) == name:
        return feature
    return replace(feature, mm_hash=ours, identifier=prefixed(feature.identifier, group))
