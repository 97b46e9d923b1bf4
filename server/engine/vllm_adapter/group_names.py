"""Names of items by the group of API keys, so that groups share no cached media."""

import contextvars
from concurrent.futures import Executor
from typing import Any

from server.request import context as requests
from server.request.groups import prefixed


def keep_groups_apart(renderer: Any) -> None:
    """Let vLLM's `renderer` name items by the group of the current request, also in its thread."""
    if renderer.mm_processor is not None:
        name_by_group(renderer.mm_processor)
        carry_context(renderer._mm_executor)


def name_by_group(processor: Any) -> None:
    """Let the names that vLLM's `processor` gives to items be those of the group of API keys that
    the current request belongs to (see `send.keep_in_group`)."""
    hashes_of = processor._get_mm_hashes

    def named(inputs: Any) -> dict[str, list[str]]:
        hashes, group = hashes_of(inputs), requests.current().group
        return {kind: [prefixed(name, group) for name in names] for kind, names in hashes.items()}

    processor._get_mm_hashes = named


def carry_context(executor: Executor) -> None:
    """Let what is submitted to `executor` run in the context of its caller."""
    submit: Any = executor.submit

    def submit_in_context(work: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(contextvars.copy_context().run, work, *args, **kwargs)

    executor.submit = submit_in_context  # type: ignore[method-assign]
