"""Checks that hold for every answer of the server, whatever was sent: no failure, and errors in the
shape of their API and in the words of this server."""

import json
import re
from collections.abc import Iterator
from typing import Any

from server.errors import CODES
from server.http.errors import dialect_of

# What only a library writes.
_FOREIGN = re.compile(
    r"Traceback|object has no|object is not|\.py\b|pydantic|positional argument|keyword argument"
    r"|<class |vllm\.|/project/|jinja2?\.|NoneType|site-packages|\b0x[0-9a-f]{6,}"
)
# A server may be busy or unavailable; it may not fail.
_ALLOWED_ABOVE_500 = (501, 503)


def check(path: str, status: int, text: str) -> None:
    """Check an answer of the route at `path`: a document, or the events of a stream."""
    assert status < 500 or status in _ALLOWED_ABOVE_500, f"{status}: {text}"
    for error in _errors(path, status, text):
        assert error["message"], text
        assert error["code"] in CODES, text
        assert error["code"] != "internal_error", text
        assert error.keys() >= {"message", "type", "param", "code"}, text
        assert not _FOREIGN.search(error["message"]), text


def _errors(path: str, status: int, text: str) -> Iterator[dict[str, Any]]:
    """The error of a refusal, or those in the events of a stream."""
    if status >= 400:
        body = json.loads(text)
        is_anthropic = dialect_of(path) == "anthropic"
        assert body.keys() == ({"type", "error", "request_id"} if is_anthropic else {"error"}), text
        yield body["error"]
        return
    for line in text.splitlines():
        if line.startswith("data: ") and '"error"' in line:
            error = json.loads(line.removeprefix("data: ")).get("error")
            if error is not None:
                yield error
