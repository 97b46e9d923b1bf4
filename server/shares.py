"""The part of the server's limits that one of several front ends has."""

from typing import Any

from server.front_ends import FrontEnd
from server.settings import Settings, leaves

# Limits of the server as a whole. Others are limits of one request, or of what is in one place:
# the engines, the disk, the limits of API keys.
_COUNTS = frozenset(
    {
        "image_workers",
        "image_queue",
        "max_decode_pixels",
        "video_workers",
        "video_queue",
        "fetch_connections",
        "fetch_connections_per_host",
        "max_connections",
        "max_running_requests",
        "max_waiting_requests",
        "max_running_image_tokens",
    }
)
_GIB = frozenset({"retained_media_gb", "request_memory_gb", "fetch_cache_gb", "media_memory_gb"})


def part_of(settings: Settings, mine: FrontEnd) -> Settings:
    """`settings` with this front end's part of each limit, at least 1; all parts together are the
    whole."""
    groups: dict[str, dict[str, Any]] = {}
    for group, name, _ in leaves():
        total = getattr(getattr(settings, group), name)
        if total is None:
            continue
        if name in _COUNTS:
            groups.setdefault(group, {})[name] = mine.share(total)
        elif name in _GIB:
            groups.setdefault(group, {})[name] = total / mine.count
    changed = {
        group: getattr(settings, group).model_copy(update=parts) for group, parts in groups.items()
    }
    return settings.model_copy(update=changed)
