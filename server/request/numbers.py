"""Refuses integers that no field of a request can hold.

JSON has integers of any length, and Python reads them. The engine gets requests as MessagePack,
whose integers have 64 bits.
"""

import re
from typing import Any

from server.errors import ClientError

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1
# Shorter integers have fewer than 64 bits.
_LONG_INTEGER = re.compile(rb"[0-9]{19}")


def check_integers(document: Any, text: bytes) -> None:
    """Check all integers of `document`, which was read from `text`.

    Raises:
        ClientError: one needs more than 64 bits; `param` is its path.
    """
    if _LONG_INTEGER.search(text) is None:
        return
    pending = [(document, "")]
    while pending:
        value, path = pending.pop()
        if isinstance(value, dict):
            pending += [(each, f"{path}.{key}" if path else key) for key, each in value.items()]
        elif isinstance(value, list):
            pending += [(each, f"{path}[{place}]") for place, each in enumerate(value)]
        elif isinstance(value, int) and not _LEAST <= value <= _MOST:
            raise ClientError(f"{path}: the integer is out of range", param=path)
