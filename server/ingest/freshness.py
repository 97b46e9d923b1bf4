"""The rules of RFC 9111 (HTTP caching) for a response: whether it may be kept, how long it is
fresh, and how it is revalidated.

The rules are those of a private cache that serves nothing stale and guesses no lifetime. So
`private`, `s-maxage`, `must-revalidate`, `immutable` and the `stale-` directives change nothing,
and a response that states no lifetime is stale at once. Malformed or contradictory directives and
dates shorten the time for which a response is fresh; they never extend it. Neither does a wrong
clock of this machine: `Expires` counts only from the `Date` beside it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Self

HttpHeader = tuple[bytes, bytes]
"""(name, value). The names in responses are in lower case."""

MAX_HEAD_BYTES = 4096
_LINE_BYTES = 64
# Section 1.2.2: the value to use for a number of seconds that is too large to represent.
MAX_SECONDS = 1 << 31

_FIELDS = (b"age", b"cache-control", b"date", b"etag", b"expires", b"last-modified", b"vary")
# These describe a single message: they do not outlast it in the cache.
_OF_ONE_MESSAGE = (b"age", b"date")

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_DIRECTIVE = re.compile(
    rb"[ \t]*+(?:(?P<name>%b)(?:=(?:(?P<token>%b)|\"(?P<quoted>(?:[^\"\\]|\\.)*+)\"))?+)?+"
    rb"[ \t]*+(?:,|\Z)" % (_TOKEN, _TOKEN)
)
_ENTITY_TAG = re.compile(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*+"')  # RFC 9110, section 8.8.3
# The zone, or the year of the format that has none; other zones are invalid (section 4.2).
_DATE_END = re.compile(rb" (?:GMT|UTC|[0-9]{4})\Z")


@dataclass(frozen=True)
class ResponseHead:
    """The header fields of a response with status 200 that caching depends on: {name: values}."""

    fields: Mapping[bytes, Sequence[bytes]]

    @classmethod
    def of(cls, headers: Iterable[HttpHeader]) -> Self:
        """The head of a response with these `headers`."""
        fields: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            if name in _FIELDS:
                fields.setdefault(name, []).append(value)
        return cls(fields)

    @property
    def size(self) -> int:
        """Bytes of all lines, including the overhead of Python objects."""
        return sum(_LINE_BYTES + len(line) for lines in self.fields.values() for line in lines)

    def may_be_kept(self) -> bool:
        """Whether a cache may keep the response (section 3)."""
        if self.size > MAX_HEAD_BYTES or b"no-store" in self._directives():
            return False
        # Section 4.1: all our requests for a URL have the same fields, so that any other field that
        # a response varies by is equal.
        return b"*" not in (name.strip() for name in self._list(b"vary").split(b","))

    def fresh_s(self, received_at: float, delay_s: float) -> float:
        """For how many more seconds the response is fresh (section 4.2); negative if it is stale.

        `received_at` is the current time in seconds since 1970; `delay_s` is the number of seconds
        since the request was sent.
        """
        date = _date(self._only(b"date"))
        apparent_age = max(0.0, received_at - date) if date is not None else 0.0
        # Section 5.1: the first of several ages counts, and an invalid one is ignored.
        stated_age = _seconds(self._list(b"age").split(b",")[0].strip()) or 0
        age = max(apparent_age, stated_age + delay_s)  # section 4.2.3
        return self._lifetime(date) - age

    def conditions(self) -> list[HttpHeader]:
        """The request header fields that revalidate the response (section 4.3.1)."""
        conditions = []
        if tag := self._entity_tag():
            conditions.append((b"If-None-Match", tag))
        modified = self._only(b"last-modified")
        if modified is not None and _date(modified) is not None:
            conditions.append((b"If-Modified-Since", modified))
        return conditions

    def is_confirmed_by(self, newer: "ResponseHead") -> bool:
        """Whether a 304 with the head `newer` confirms this response (section 4.3.4)."""
        ours, theirs = self._entity_tag(), newer._entity_tag()
        if ours is None or theirs is None:
            return True
        return ours.removeprefix(b"W/") == theirs.removeprefix(b"W/")

    def updated(self, newer: "ResponseHead") -> Self:
        """This head after a 304 with the head `newer` (section 3.2)."""
        lasting = {n: values for n, values in self.fields.items() if n not in _OF_ONE_MESSAGE}
        return type(self)({**lasting, **newer.fields})

    def _lifetime(self, date: float | None) -> float:
        """Freshness lifetime in seconds (section 4.2.1) of a response that was made at `date`."""
        directives = self._directives()
        if b"no-cache" in directives:  # even with field names, as section 5.2.2.4 allows
            return 0
        if ages := directives.get(b"max-age"):
            return (len(ages) == 1 and _seconds(*ages)) or 0
        expires = _date(self._only(b"expires"))
        return 0 if expires is None or date is None else expires - date

    def _directives(self) -> dict[bytes, set[bytes]]:
        """Cache-Control as {directive: its different values}; `no-store` if it is malformed."""
        text = self._list(b"cache-control")
        directives: dict[bytes, set[bytes]] = {}
        position = 0
        while position < len(text):
            found = _DIRECTIVE.match(text, position)
            if found is None:
                return {b"no-store": set()}
            if name := found["name"]:
                value = found["token"] or found["quoted"] or b""
                directives.setdefault(name.lower(), set()).add(value)
            position = found.end()
        return directives

    def _entity_tag(self) -> bytes | None:
        tag = self._only(b"etag")
        return tag if tag is not None and _ENTITY_TAG.fullmatch(tag) else None

    def _list(self, name: bytes) -> bytes:
        """The value of a list field, with its lines joined."""
        return b",".join(self.fields.get(name, ()))

    def _only(self, name: bytes) -> bytes | None:
        """The value of a field with a single value; None if it is missing or its lines differ."""
        values = set(self.fields.get(name, ()))
        return values.pop() if len(values) == 1 else None


def _seconds(text: bytes) -> int | None:
    if not text.isdigit():
        return None
    return min(int(text), MAX_SECONDS) if len(text) < 20 else MAX_SECONDS


def _date(text: bytes | None) -> float | None:
    """Seconds since 1970; None if `text` is not an HTTP date (RFC 9110, section 5.6.7)."""
    if text is None or not _DATE_END.search(text):
        return None
    try:
        return parsedate_to_datetime(text.decode("ascii")).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
