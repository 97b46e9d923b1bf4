"""What the layers of the server know of a request, in its ASGI scope."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from server.http.large_body import LargeBody
from server.request.admission import Turn
from server.request.context import RequestContext
from server.request.limits import Quota
from server.telemetry.record import Record

_CONNECTION = "saccade.connection"
_RECORD = "saccade.record"
_CONTEXT = "saccade.context"
_DOCUMENT = "saccade.document"
_QUOTAS = "saccade.quotas"
_SEND = "saccade.send"
_RECEIVE = "saccade.receive"
_ITEM = "saccade.item"


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


def set_receive(scope: Scope, receive: Receive) -> None:
    """Store how messages are received that come from the connection as they are."""
    scope[_RECEIVE] = receive


def receives_directly(scope: Scope, receive: Receive) -> bool:
    """Whether no layer in between, such as middleware of users, reads or changes what `receive`
    returns."""
    return scope.get(_RECEIVE) is receive


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


def path_of(scope: Scope) -> str:
    """The path below the root path, as in the routes."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def set_quotas(scope: Scope, quotas: tuple[Quota, ...]) -> None:
    """Store the limits of the request's key; the check of keys does it."""
    scope[_QUOTAS] = quotas


def quotas_of(scope: Scope) -> tuple[Quota, ...]:
    """The limits of the request's key and of its group."""
    quotas: tuple[Quota, ...] = scope.get(_QUOTAS, ())
    return quotas


def set_document(scope: Scope, document: dict[str, Any]) -> None:
    """Store the body as a JSON object, with handles in the place of media."""
    scope[_DOCUMENT] = document


def document_of(scope: Scope) -> dict[str, Any] | None:
    """The body as a JSON object; None if the route has to parse the body itself."""
    document: dict[str, Any] | None = scope.get(_DOCUMENT)
    return document


def set_direct_send(scope: Scope, send: Send) -> None:
    """Store where the body of a stream may go, past the layers that look at its start only."""
    scope[_SEND] = send


def direct_send(scope: Scope) -> Send | None:
    """Where the body of a stream may go; None if it has to pass all layers."""
    send: Send | None = scope.get(_SEND)
    return send


@dataclass(frozen=True)
class BatchItem:
    """A request that the server makes for a batch of `group`. It has its `turn` already."""

    group: str
    turn: Turn


def set_item(scope: Scope, item: BatchItem) -> None:
    """Mark a request of a batch. No client can: the server makes the scopes of their requests."""
    scope[_ITEM] = item


def item_of(scope: Scope) -> BatchItem | None:
    """The mark of a request of a batch; None of others."""
    item: BatchItem | None = scope.get(_ITEM)
    return item


class Connection(Protocol):
    """What a request sees of its connection. `on_leaving` is called when the client leaves."""

    on_leaving: Callable[[], None] | None

    @property
    def engine_has_died(self) -> bool:
        """Whether the server stops for this reason."""

    def body_begins(self) -> bool:
        """The body takes its share of the memory now. Returns whether it was let in by its head, so
        that it may wait for it."""

    def rest_of_body(self, nbytes: int) -> LargeBody | None:
        """To read the rest of the request's body, `nbytes`, of which nothing has been received;
        None if it has to come as messages."""


def set_connection(scope: Scope, connection: Connection) -> None:
    """Store the connection."""
    scope[_CONNECTION] = connection


def connection_of(scope: Scope) -> Connection | None:
    """The connection of the request; None with another server."""
    connection: Connection | None = scope.get(_CONNECTION)
    return connection


def take_connection(scope: Scope) -> Connection | None:
    """The connection, which is in the scope no longer: it knows this scope, and the two would wait
    for the garbage collector. None with another server."""
    connection: Connection | None = scope.pop(_CONNECTION, None)
    return connection
