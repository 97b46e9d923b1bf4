"""Bounds on the structure of a JSON body: values, nesting, and items of its lists.

Validation by pydantic costs up to a thousand times as much as parsing, so its input is bounded in
what it costs and not only in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import RequestTooComplex

# Below this size the steps of Python are cheaper than numpy's.
_SMALL_BYTES = 16 * 1024
_OPENING, _CLOSING, _COMMA = (ord("["), ord("{")), (ord("]"), ord("}")), ord(",")
_QUOTE = ord('"')
# What an object, an array, a string or a name costs to parse more than a number.
_EXTRA = 3
# Where lists of items are inside of items: content parts, tool calls, results of tools.
_INNER_LISTS = ("content", "tool_calls", "output")


@dataclass(frozen=True)
class BodyBounds:
    """What a JSON body may have.

    Attributes:
        json_bytes: its size without the payloads of media.
        values: JSON values; an object, an array, a string or a name counts as four.
        depth: objects and arrays inside of one another.
        items: messages, content parts, tools, prompts and other items of its lists, without
            numbers.
    """

    json_bytes: int
    values: int
    depth: int
    items: int


def check_text(body: bytes, bounds: BodyBounds) -> None:
    """Hold the text of a JSON body against the bounds on values and depth, before it is parsed.

    Takes a few milliseconds per MiB at most, and some microseconds for most bodies.

    Raises:
        RequestTooComplex: there are too many values, or they are nested too deeply.
    """
    openings = _count(body, _OPENING)
    # This counts what is inside of texts too, and is seldom too much.
    most = _values(openings, _count(body, (_COMMA,)), _count(body, (_QUOTE,)))
    if openings <= bounds.depth and most <= bounds.values:
        return
    outside, quotes = _without_texts(body, bounds.values)
    openings = _count(outside, _OPENING)
    values = _values(openings, _count(outside, (_COMMA,)), quotes)
    if max(values, quotes) > bounds.values:
        raise RequestTooComplex(
            f"the request body has more than {bounds.values} JSON values, which is the limit"
        )
    if openings > bounds.depth and _depth(outside) > bounds.depth:
        raise RequestTooComplex(
            f"the request body is nested more than {bounds.depth} levels deep, which is the limit"
        )


def _count(body: bytes, characters: tuple[int, ...]) -> int:
    """How often any of `characters` is in `body`."""
    if len(body) < _SMALL_BYTES:
        return sum(map(body.count, characters))
    codes = np.frombuffer(body, np.uint8)
    return sum(int(np.count_nonzero(codes == character)) for character in characters)


def _without_texts(body: bytes, most_quotes: int) -> tuple[bytes, int]:
    """A JSON document without its strings, and the number of their quotes; an empty document if
    there are more than `most_quotes`."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = _count(body, (_QUOTE,))
    return (b"" if quotes > most_quotes else b"".join(body.split(b'"')[::2])), quotes


def _values(openings: int, commas: int, quotes: int) -> int:
    """Each value but the first of a container follows a comma."""
    return 1 + openings + commas + _EXTRA * (openings + quotes // 2)


def _depth(outside: bytes) -> int:
    """The deepest nesting in a JSON document without strings."""
    codes = np.frombuffer(outside, np.uint8)
    opening, closing = (_is_one_of(codes, kinds) for kinds in (_OPENING, _CLOSING))
    steps = (opening.view(np.int8) - closing.view(np.int8))[opening | closing]
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def _is_one_of(codes: NDArray[np.uint8], kinds: tuple[int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (codes == kinds[0]) | (codes == kinds[1])
    return found


def check_items(document: Mapping[str, Any], most: int) -> None:
    """Hold the lists of a request against the bound on items.

    Raises:
        RequestTooComplex: there are too many; `param` names the list in which they end.
    """
    count = 0
    for name, value in document.items():
        if isinstance(value, list):
            count = _counted(value, name, count, most)


def _counted(items: list[Any], path: str, count: int, most: int) -> int:
    """`count` and the items in `items`, in lists inside of it too."""
    count += sum(type(item) is not int and type(item) is not float for item in items)
    if count > most:
        raise RequestTooComplex(
            f"the request has more than {most} messages, content parts, tools and other items, "
            "which is the limit",
            param=path,
        )
    for index, item in enumerate(items):
        if isinstance(item, dict):
            for name in _INNER_LISTS:
                if isinstance(inner := item.get(name), list):
                    count = _counted(inner, f"{path}[{index}].{name}", count, most)
        elif isinstance(item, list):
            count = _counted(item, f"{path}[{index}]", count, most)
    return count
