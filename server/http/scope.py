"""The record and the context of a request, in its ASGI scope."""

from starlette.types import Scope

from server.request.context import RequestContext
from server.telemetry.record import Record

_RECORD = "saccade.record"
_CONTEXT = "saccade.context"


def set_record(scope: Scope, record: Record) -> None:
    """Store the record of the request; the outermost layer does it."""
    scope[_RECORD] = record


def record_of(scope: Scope) -> Record:
    """The record of the request; a new one for a websocket, which has none."""
    if _RECORD not in scope:
        scope[_RECORD] = Record()
    record: Record = scope[_RECORD]
    return record


def group_of(scope: Scope) -> str:
    """The group of API keys that the request belongs to; "" where keys are in no groups."""
    return record_of(scope).key_group or ""


def set_context(scope: Scope, context: RequestContext) -> None:
    """Store the context of the request; the body reader does it."""
    scope[_CONTEXT] = context


def context_of(scope: Scope) -> RequestContext:
    """The context of the request.

    Raises:
        KeyError: its body has not been read.
    """
    context: RequestContext = scope[_CONTEXT]
    return context
