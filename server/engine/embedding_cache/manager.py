"""vLLM's encoder cache manager, which tells when it is emptied.

vLLM empties it when the weights have changed, by several ways, and tells no connector.
"""

from collections.abc import Callable

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

# Those of the scheduler in this process.
listeners: list[Callable[[], None]] = []


class AnnouncedEncoderCache(EncoderCacheManager):
    """Calls the `listeners` after each reset."""

    def reset(self) -> None:
        super().reset()
        for listener in listeners:
            listener()
