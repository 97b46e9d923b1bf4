"""Headers of requests, which are read in one way everywhere: a header that must be single is."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ClientError
from server.http.errors import respond

# What readers of headers, such as proxies, vLLM and FastAPI, take from different ones of several.
_SINGLE = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"endpoint-load-metrics-format",
        b"expect",
        b"host",
        b"origin",
        b"proxy-authorization",
        b"user-agent",
        b"x-api-key",
        b"x-data-parallel-rank",
        b"x-session-id",
        b"x-vllm-priority",
    }
)
_SINGLE_PREFIX = b"x-request-"
# The parser refuses lengths from 2**64 on.
_LENGTH_DIGITS = 20


def value_of(scope: Scope, name: bytes) -> bytes:
    """The value of the header with this name, in lower case; b"" without one."""
    for given, value in scope["headers"]:
        if given == name:
            found: bytes = value
            return found
    return b""


def length_in(value: bytes) -> int:
    """The number of bytes that a `Content-Length` announces; 0 if it is no number. The parser
    accepts any number of zeros before it, but Python does not."""
    return int(value[-_LENGTH_DIGITS:]) if value.isdigit() else 0


class SingleHeaders:
    """Refuses requests that repeat a header which must be single."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            names = [name for name, _ in scope["headers"]]
            if len(names) != len(set(names)) and (name := _repeated(names)) is not None:
                error = ClientError(f"the header {name.decode('latin-1')} is given more than once")
                await respond(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _repeated(names: list[bytes]) -> bytes | None:
    """The first repeated name that must be single; None without one."""
    seen: set[bytes] = set()
    for name in names:
        if name in seen and (name in _SINGLE or name.startswith(_SINGLE_PREFIX)):
            return name
        seen.add(name)
    return None
