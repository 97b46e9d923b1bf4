"""What an engine keeps for each of several front ends (`several_clients`): in its process."""

import sys
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

_CORE = "vllm.v1.engine.core"


class ClientCaches:
    """The engine's half of the processor cache of each client, which are emptied one by one.

    Attributes:
        client: whose request is read next.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        self._caches = caches
        self.client = 0

    def get_and_update_features(
        self, features: list[MultiModalFeatureSpec]
    ) -> list[MultiModalFeatureSpec]:
        found: list[MultiModalFeatureSpec]
        found = self._caches[self.client].get_and_update_features(features)
        return found

    def clear_client(self, client: int) -> None:
        self._caches[client].clear_cache()

    def clear_cache(self) -> None:
        for cache in self._caches:
            cache.clear_cache()


def register(clients: int) -> None:
    """Let the engine core of this process, if it gets one, serve so many clients."""
    core = sys.modules.get(_CORE)
    if core is None or hasattr(core.EngineCore, "forget_client"):
        return
    base, make = core.EngineCore, core.engine_receiver_cache_from_config
    preprocess = base.preprocess_add_request

    def make_caches(config: VllmConfig) -> ClientCaches | None:
        caches = [make(config) for _ in range(clients)]
        return None if caches[0] is None else ClientCaches(caches)

    def preprocess_add_request(self: Any, request: Any) -> Any:
        if self.mm_receiver_cache is not None:
            self.mm_receiver_cache.client = request.client_index
        return preprocess(self, request)

    def forget_items(self: Any, client: int) -> None:
        if self.mm_receiver_cache is not None:
            self.mm_receiver_cache.clear_client(client)

    def forget_client(self: Any, client: int) -> None:
        requests = self.scheduler.requests.values()
        self.abort_requests([each.request_id for each in requests if each.client_index == client])
        forget_items(self, client)

    vars(core)["engine_receiver_cache_from_config"] = make_caches
    base.preprocess_add_request = preprocess_add_request
    base.forget_items = forget_items
    base.forget_client = forget_client
