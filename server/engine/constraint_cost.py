"""What a constraint on the output costs to compile: JSON schemas, grammars, regular expressions.

The engine compiles constraints in threads beside its loop. Their number is small, and the time
grows with the constraint and with the vocabulary, so one client could keep others waiting.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from server.errors import ClientError
from server.settings import ConstraintSettings

# Keywords of JSON schema whose value is how often something repeats.
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties",
                     "maxProperties", "minContains", "maxContains"))  # fmt: skip
# `{m}`, `{m,}` and `{m,n}` of regular expressions and EBNF, and `~m..n` of Lark.
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
# The compiler merges the states of longer repetitions, which take no more time.
_MOST_COUNTED = 256
_DIGITS = 15
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


def check_schema(schema: Any, limits: ConstraintSettings, param: str) -> None:
    """Check a JSON schema, or a structural tag, as text or as read.

    Raises:
        ClientError: it exceeds a limit.
    """
    if isinstance(schema, str):
        _check_bytes(schema, limits, param)
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise _too_deep(limits, param) from None
        except ValueError:  # vLLM refuses it
            return
    size, repeats = 0, 0.0
    for entries, (depth, key, value) in enumerate(_walk(schema), 1):
        if entries > limits.constraint_max_entries:
            raise ClientError(
                f"the schema has more than {limits.constraint_max_entries} entries, which is the "
                "limit; properties, values of enums and their parts count",
                param=param,
            )
        if depth > limits.constraint_max_depth:
            raise _too_deep(limits, param)
        size += len(key or "") + len(value if isinstance(value, str) else ())
        if size > limits.constraint_max_bytes:
            raise _too_large(limits, param)
        if key in _COUNTS and isinstance(value, int | float):
            repeats += min(value, _MOST_COUNTED)
        elif key in ("pattern", "grammar") and isinstance(value, str):
            repeats += _measured(value, limits, param)
        _check_repeats(repeats, limits, param)


def check_choices(choices: list[str], limits: ConstraintSettings, param: str) -> None:
    """Check a list of choices. Raises ClientError if it exceeds a limit."""
    if len(choices) > limits.constraint_max_entries:
        raise ClientError(
            f"there are more than {limits.constraint_max_entries} choices, which is the limit",
            param=param,
        )
    if sum(map(len, choices)) > limits.constraint_max_bytes:
        raise _too_large(limits, param)


def check_pattern(text: str, limits: ConstraintSettings, param: str) -> None:
    """Check a regular expression or a grammar. Raises ClientError if it exceeds a limit."""
    _check_repeats(_measured(text, limits, param), limits, param)


def _measured(text: str, limits: ConstraintSettings, param: str) -> int:
    """The sum of the repetition counts of a regular expression or a grammar, within the other
    limits."""
    _check_bytes(text, limits, param)
    depth = 0
    for character in text:  # brackets in strings count too: this is a limit, not a parser
        if character in _OPEN:
            depth += 1
            if depth > limits.constraint_max_depth:
                raise _too_deep(limits, param)
        elif character in _CLOSE:
            depth = max(0, depth - 1)
    return sum(
        min(int((most or least or lark_most or lark_least)[:_DIGITS]), _MOST_COUNTED)
        for least, most, lark_least, lark_most in _REPEAT.findall(text)
    )


def _walk(schema: Any) -> Iterator[tuple[int, str | None, Any]]:
    """(depth, key, value) of each entry of all objects and lists."""
    pending: list[tuple[int, Any]] = [(1, schema)]
    while pending:
        depth, value = pending.pop()
        if isinstance(value, dict):
            for key, each in value.items():
                yield depth, key, each
                pending.append((depth + 1, each))
        elif isinstance(value, list):
            for each in value:
                yield depth, None, each
                pending.append((depth + 1, each))


def _check_bytes(text: str, limits: ConstraintSettings, param: str) -> None:
    if len(text) > limits.constraint_max_bytes:
        raise _too_large(limits, param)


def _check_repeats(count: float, limits: ConstraintSettings, param: str) -> None:
    if count > limits.constraint_max_repeats:
        raise ClientError(
            "the repetition counts of the constraint, such as {0,100} or maxLength, sum up to "
            f"more than {limits.constraint_max_repeats}, which is the limit",
            param=param,
        )


def _too_large(limits: ConstraintSettings, param: str) -> ClientError:
    return ClientError(
        f"the constraint has more than {limits.constraint_max_bytes} bytes, which is the limit",
        param=param,
    )


def _too_deep(limits: ConstraintSettings, param: str) -> ClientError:
    return ClientError(
        f"the constraint is nested more than {limits.constraint_max_depth} levels deep, which is "
        "the limit",
        param=param,
    )
