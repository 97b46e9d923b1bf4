"""Budgets: what all requests together may hold of memory and of image tokens.

    await holdings.take(Item.FILES, nbytes)  # waits until there is room
    ...
    holdings.close()                         # at the end of the request

Requests that hold something and wait for more could wait for one another. When all that hold
something wait, one of them may exceed the totals: it is never blocked, ends, and makes room. A
budget therefore holds at most its total and the needs of one request.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from server.errors import ImageTokensFull, MediaMemoryFull, ServerBusy
from server.telemetry import metrics


class Resource(StrEnum):
    """What is limited. The values are labels of metrics."""

    MEDIA = "media_bytes"
    IMAGE_TOKENS = "image_tokens"


class Item(StrEnum):
    """What a request holds: encoded files, and the features and the tokens of its images."""

    FILES = "files"
    FEATURES = "features"
    IMAGE_TOKENS = "image_tokens"


_RESOURCE = {
    Item.FILES: Resource.MEDIA,
    Item.FEATURES: Resource.MEDIA,
    Item.IMAGE_TOKENS: Resource.IMAGE_TOKENS,
}
_ERRORS: dict[Resource, tuple[type[ServerBusy], str]] = {
    Resource.MEDIA: (MediaMemoryFull, "bytes of images and clips"),
    Resource.IMAGE_TOKENS: (ImageTokensFull, "image tokens"),
}


@dataclass(eq=False)
class _Waiter:
    holdings: "Holdings"
    item: Item
    amount: int
    granted: asyncio.Future[None]


class Budgets:
    """The totals, and what is held of them. Shares are given in the order of asking."""

    def __init__(
        self,
        totals: Mapping[Resource, int],
        wait_s: float,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`wait_s` is the longest time that a request waits for a share, in seconds. `on_room` is
        called when nobody waits any more."""
        self.totals = totals
        self.held = dict.fromkeys(Resource, 0)
        self._wait_s = wait_s
        self._on_room = on_room
        self._waiting: list[_Waiter] = []
        self._holders: set[Holdings] = set()
        self._exceeding: Holdings | None = None
        for resource in Resource:
            metrics.admission_limit.labels(resource).set(totals[resource])
            held = functools.partial(self.held.__getitem__, resource)
            metrics.admission_held.labels(resource).set_function(held)

    @property
    def is_short(self) -> bool:
        """Whether a request waits for a share."""
        return bool(self._waiting)

    @property
    def short_of(self) -> Resource | None:
        """The resource that a request waits for; None if nobody waits."""
        return _RESOURCE[self._waiting[0].item] if self._waiting else None

    def error(self, resource: Resource) -> ServerBusy:
        """The refusal of a request that found no room."""
        kind, what = _ERRORS[resource]
        return kind(
            f"running requests hold {self.held[resource]} {what}, the limit is "
            f"{self.totals[resource]}; try again later"
        )

    async def wait(self, holdings: "Holdings", item: Item, amount: int) -> None:
        """Hold `amount` of `item` for `holdings`, as soon as there is room.

        Raises:
            ServerBusy: there was none in time.
        """
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(holdings, item, amount, granted)
        self._waiting.append(waiter)
        self._advance()
        try:
            async with asyncio.timeout(self._wait_s):
                await granted
        except TimeoutError:
            raise self.error(_RESOURCE[item]) from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._advance()  # those behind it may have room

    def has_room(self, item: Item, amount: int) -> bool:
        """Whether `wait` would not wait."""
        resource = _RESOURCE[item]
        return not self._waiting and self.held[resource] + amount <= self.totals[resource]

    def add(self, item: Item, amount: int) -> None:
        """Note that `amount` more is held, or less if it is negative."""
        self.held[_RESOURCE[item]] += amount
        if amount < 0 and self._waiting:
            self._advance()

    def begin(self, holdings: "Holdings") -> None:
        """`holdings` holds something from now on."""
        self._holders.add(holdings)

    def end(self, holdings: "Holdings") -> None:
        """`holdings` holds nothing any more, and will not."""
        self._holders.discard(holdings)
        if self._exceeding is holdings:
            self._exceeding = None
        self._advance()

    def _advance(self) -> None:
        if not self._waiting:
            return
        full: set[Resource] = set()
        for waiter in list(self._waiting):
            resource = _RESOURCE[waiter.item]
            fits = self.held[resource] + waiter.amount <= self.totals[resource]
            if fits and resource not in full:
                self._grant(waiter)
            else:
                full.add(resource)
        if all(self.held[resource] <= self.totals[resource] for resource in Resource):
            self._exceeding = None
        if self._exceeding is None and self._waiting:
            waiting = [waiter.holdings for waiter in self._waiting]
            if self._holders.issubset(waiting):  # none of them would end
                self._exceeding = next((each for each in waiting if each.holds_any), waiting[0])
        for waiter in list(self._waiting):
            if waiter.holdings is self._exceeding:
                self._grant(waiter)
        if not self._waiting:
            self._on_room()

    def _grant(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        if not waiter.granted.done():
            waiter.holdings.note(waiter.item, waiter.amount)
            waiter.granted.set_result(None)


class Holdings:
    """What one request holds. Without `budgets`, there are no limits."""

    __slots__ = ("_amounts", "_budgets", "_closed")

    def __init__(self, budgets: Budgets | None = None) -> None:
        self._budgets = budgets
        self._amounts: dict[Item, int] = {}
        self._closed = False

    @property
    def holds_any(self) -> bool:
        return any(self._amounts.values())

    async def take(self, item: Item, amount: int) -> None:
        """Hold `amount` more of `item`.

        Raises:
            MediaMemoryFull, ImageTokensFull: there was no room in time.
        """
        if self._budgets is None or self._budgets.has_room(item, amount):
            self.note(item, amount)
        else:
            await self._budgets.wait(self, item, amount)

    def note(self, item: Item, amount: int) -> None:
        """Hold `amount` more of `item`, or less if it is negative, whether there is room or not."""
        if self._closed or self._budgets is None:
            return
        if not self._amounts:
            self._budgets.begin(self)
        held = self._amounts.get(item, 0)
        amount = max(amount, -held)
        self._amounts[item] = held + amount
        self._budgets.add(item, amount)

    def give_back(self, item: Item) -> None:
        """Hold nothing of `item` any more."""
        if held := self._amounts.get(item):
            self.note(item, -held)

    def close(self) -> None:
        """Hold nothing, and take nothing from now on."""
        for item in self._amounts:
            self.give_back(item)
        self._closed = True
        if self._budgets is not None:
            self._budgets.end(self)
