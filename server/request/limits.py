"""Limits of API keys and of their groups: requests and tokens a minute, and concurrency."""

import math
import time
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import dataclass

from server.errors import RateLimited
from server.request.shared_usage import Cells, own_cells

_MINUTE_S = 60.0


@dataclass(frozen=True)
class Limits:
    """What one key, or all keys of a group together, may use; None: as much as there is.

    Attributes:
        requests_per_minute: requests that begin.
        tokens_per_minute: tokens of prompts and answers.
        image_tokens_per_minute: tokens of images and videos in prompts.
        concurrency: requests that wait or run at the same time.
        priority: for vLLM's priority scheduling; lower values come first.
        share: the weight of the group while requests wait; of a key it is not used.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    image_tokens_per_minute: int | None = None
    concurrency: int | None = None
    priority: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Quota:
    """The limits of one key or group. `name` identifies it, and is never the key itself."""

    name: str
    limits: Limits


class Bucket:
    """A token bucket: it holds what `per_minute` allows at once, and refills at that rate.

    More can be taken than it holds; nothing is allowed then until the debt is refilled. That is how
    tokens are charged, whose number is known only after the answer.
    """

    def __init__(self, per_minute: int, state: MutableSequence[float], *, is_new: bool) -> None:
        """`state` has its level, and when it had that. Unless the bucket `is_new`, another process
        may have begun it."""
        self.per_minute = per_minute
        self._state = state
        if is_new or not state[1]:
            state[0], state[1] = float(per_minute), time.monotonic()

    def left(self) -> float:
        """What may be taken now; negative while there is a debt."""
        now = time.monotonic()
        state = self._state
        refilled = state[0] + (now - state[1]) * self.per_minute / _MINUTE_S
        state[0], state[1] = min(float(self.per_minute), refilled), now
        return state[0]

    def take(self, amount: float) -> None:
        self._state[0] = self.left() - amount

    def seconds_until(self, amount: float) -> float:
        """How long until the bucket holds `amount`."""
        missing = min(amount, self.per_minute) - self.left()
        return max(0.0, missing * _MINUTE_S / self.per_minute)


class Usage:
    """What one key or group has used, against its limits."""

    def __init__(self, limits: Limits, cells: Cells | None = None) -> None:
        """`cells`: where it is counted, if other processes count there too."""
        self._cells = cells or own_cells()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._image_tokens: Bucket | None = None
        self.change(limits)

    @property
    def active(self) -> int:
        """Requests that wait or run now."""
        return sum(self._cells.active)

    def change(self, limits: Limits) -> None:
        """Apply other limits from now on. A bucket whose limit is new begins full."""
        self.limits = limits
        requests, tokens, image_tokens = self._cells.buckets
        self._requests = _bucket(limits.requests_per_minute, self._requests, requests)
        self._tokens = _bucket(limits.tokens_per_minute, self._tokens, tokens)
        self._image_tokens = _bucket(
            limits.image_tokens_per_minute, self._image_tokens, image_tokens
        )

    @property
    def is_idle(self) -> bool:
        """Whether forgetting it would change nothing."""
        buckets = (self._requests, self._tokens, self._image_tokens)
        return not self.active and all(
            bucket is None or bucket.left() >= bucket.per_minute for bucket in buckets
        )

    def check(self) -> None:
        """Hold a new request against the limits.

        Raises:
            RateLimited: it has to wait; `retry_after_s` says how long.
        """
        most = self.limits.concurrency
        if most is not None and self.active >= most:
            raise RateLimited(f"this key may have {most} requests at the same time")
        for bucket, needed, what in (
            (self._requests, 1.0, "requests"),
            (self._tokens, 1.0, "tokens"),
            (self._image_tokens, 1.0, "image tokens"),
        ):
            if bucket is not None and bucket.left() < needed:
                error = RateLimited(f"this key may use {bucket.per_minute} {what} per minute")
                error.retry_after_s = math.ceil(bucket.seconds_until(needed)) or 1
                raise error

    def half_full_in(self) -> float:
        """How long until half of what may be used per minute is left after one more request, in
        seconds."""
        buckets = filter(None, (self._requests, self._tokens, self._image_tokens))
        return max((each.seconds_until(each.per_minute / 2 + 1) for each in buckets), default=0.0)

    def begin(self, *, counts: bool = True) -> None:
        """Count a request that has passed `check`. With `counts`, it is one of those that run at
        the same time."""
        self._cells.active[self._cells.mine] += counts
        if self._requests is not None:
            self._requests.take(1)

    def end(self, tokens: int, image_tokens: int, *, counts: bool = True) -> None:
        """Charge the tokens of a request that has ended."""
        self._cells.active[self._cells.mine] -= counts
        if self._tokens is not None:
            self._tokens.take(tokens)
        if self._image_tokens is not None:
            self._image_tokens.take(image_tokens)

    def buckets(self) -> Iterator[tuple[str, Bucket]]:
        """Its buckets that OpenAI's headers describe, each with their name for it."""
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                yield what, bucket


def headers(usages: Iterable[Usage]) -> list[tuple[bytes, bytes]]:
    """OpenAI's headers of rate limits. Of several limits, they show the one with the least left."""
    tightest: dict[str, Bucket] = {}
    for usage in usages:
        for what, bucket in usage.buckets():
            if what not in tightest or bucket.left() < tightest[what].left():
                tightest[what] = bucket
    lines = []
    for what, bucket in tightest.items():
        left = max(0, math.floor(bucket.left()))
        reset = bucket.seconds_until(bucket.per_minute)
        for name, value in (
            ("limit", f"{bucket.per_minute}"),
            ("remaining", f"{left}"),
            ("reset", f"{reset:.3g}s"),
        ):
            lines.append((f"x-ratelimit-{name}-{what}".encode(), value.encode()))
    return lines


def _bucket(
    per_minute: int | None, before: Bucket | None, state: MutableSequence[float]
) -> Bucket | None:
    if per_minute is None:
        state[1] = 0.0
        return None
    if before is not None and before.per_minute == per_minute:
        return before
    return Bucket(per_minute, state, is_new=before is not None)
