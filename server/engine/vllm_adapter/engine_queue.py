"""vLLM's limits on its queue, `--max-num-queued-reqs` and `--max-num-queued-tokens`.

vLLM checks them when a prompt is ready: its images have been fetched and decoded by then. Here they
are checked when a request asks for its permit, and vLLM's check is left to requests without one.
"""

from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from server.request import context as requests


class EngineQueue:
    """Takes the place of the engine's `check_admission`, if it has a limit."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        scheduler = engine.vllm_config.scheduler_config
        self._most_tokens = scheduler.max_num_queued_tokens
        if scheduler.max_num_queued_reqs is not None or self._most_tokens is not None:
            self._vllm_check = engine.check_admission
            vars(engine)["check_admission"] = self._check

    def why_full(self) -> str | None:
        """Why a request that asks for a permit is to be refused; None if it is not."""
        most = self._most_tokens
        if most is None or (tokens := self._engine.get_num_queued_tokens()) < most:
            return None
        return f"prompts of {tokens} tokens wait in the engine, the limit is {most}"

    def _check(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM for each prompt, with the arguments of `check_admission`."""
        try:
            has_permit = requests.current().permit is not None
        except LookupError:
            has_permit = False
        if not has_permit:
            self._vllm_check(*args, **kwargs)
