"""Routes requests of fronts to the engines that have their images; runs in each front."""

import random
from typing import Any

import numpy as np
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from server.scale import known
from server.scale.routing import Replicas, Rule, choose


class ImageAffinityRouter(RequestRouter):
    """Chooses by the argument `key` of a request and the loads of the replicas (`routing`). Loads
    are those that replicas have told, and what this front has sent since."""

    def initialize_state(self, **_: Any) -> None:
        self._random = random.Random()  # noqa: S311 - nothing secret
        self._rule = Rule()
        self._known = Replicas(())
        known.routers.add(self)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The one that `routing` chooses, and after it all, for the case that it is full."""
        if not candidate_replicas:
            return []
        if pending_request is not None:  # wait between attempts, while all are full
            pending_request.routing_context.should_backoff = True
        names = tuple(each.replica_id.unique_id for each in candidate_replicas)
        if names != self._known.names:
            self._known = Replicas(names)
        running = np.array([self._running(each.replica_id) for each in candidate_replicas])
        key = pending_request.kwargs.get("key") if pending_request is not None else None
        index = choose(key or None, self._known, running, self._rule, self._random)
        return [[candidate_replicas[index]], candidate_replicas]

    def _running(self, replica: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica) or 0
