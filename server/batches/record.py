"""The record of a batch: what a client asked for, and how far it is."""

import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from server.batches.lines import Problem
from server.batches.usage import Usage

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
# The states that have a time of their own.
_TIMED = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)


class Batch(msgspec.Struct, frozen=True):
    """The record of a batch. Times are in seconds since 1970, but for `created_ns`.

    Attributes:
        group: the group of API keys that it belongs to.
        input_id: the file that the server keeps until the batch is over.
        ends_as: what it becomes when it is finalized.
        output_lifetime_s: of its results; None: that of other files.
        times: when it entered each state.
        total: its requests; 0 before they are counted.
        usage: the tokens of the answers so far.
        model: that of the answers so far; None: they have several, or there are none.
    """

    id: Annotated[str, Meta(pattern=r"\Abatch_[0-9a-f]{32}\Z")]
    group: str
    endpoint: str
    input_file_id: str
    input_id: str
    completion_window: str
    created_ns: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_lifetime_s: int | None = None
    status: Status = "validating"
    ends_as: Status = "completed"
    times: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[Problem] = []

    @property
    def is_over(self) -> bool:
        return self.status in FINAL

    @property
    def created_at(self) -> int:
        return self.created_ns // 1_000_000_000

    def left_s(self, now: float) -> float:
        """For how long its requests may run, if the clock that shows `now` is right. At most the
        whole window, which `now` exceeds if the clock was set back."""
        return min(self.expires_at - now, float(self.expires_at - self.created_at))

    def shown(self) -> dict[str, Any]:
        """OpenAI's Batch object."""
        problems = [msgspec.to_builtins(problem) for problem in self.errors]
        is_known = self.is_over
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": problems} if problems else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if is_known else None,
            "error_file_id": self.error_file_id if is_known else None,
            "created_at": self.created_at,
            **{f"{state}_at": self.times.get(state) for state in _TIMED},
            "expires_at": self.expires_at,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "usage": self.usage.shown(),
            "model": self.model,
            "metadata": self.metadata,
        }


def new_id() -> str:
    """An id that cannot be guessed."""
    return f"batch_{secrets.token_hex(16)}"
