"""How many replicas of a tier there should be. Ray Serve's controller asks, so this is imported
there."""

from collections.abc import Iterable
from typing import Any

IMAGES = "images"
"""The name of a front's own metric: images in its workers and waiting for them, for each worker."""

# Four in five workers are busy.
_BUSY = 0.8


def fronts(context: Any) -> tuple[float, dict[str, Any]]:
    """A policy of Ray Serve: as many fronts as the requests in progress need, or their images,
    whichever are more. `context`: an `AutoscalingContext`."""
    images = (context.aggregated_metrics or {}).get(IMAGES, {})
    return needed(
        context.total_num_requests, context.config.get_target_ongoing_requests(), images.values()
    ), {}


def needed(requests: float, target: float, images: Iterable[float]) -> float:
    """How many fronts are needed for `requests` in progress, of which each may have `target`, and
    for these loads of images."""
    return max(requests / target, sum(images) / _BUSY)
