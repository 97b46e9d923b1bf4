"""The routers of this process, from which a front learns whether there are engines.

A module of its own: Ray Serve makes a copy of the router's module for each router.
"""

import weakref
from typing import Any

routers: "weakref.WeakSet[Any]" = weakref.WeakSet()


def replicas() -> int:
    """How many engines take requests, as far as this front knows."""
    return max((len(router.curr_replicas) for router in list(routers)), default=0)
