"""API keys: which requests are let in, and the group that a request belongs to.

With a file of keys, the check is made here, on the paths that vLLM guards, before the body of a
request is read; with `--keys-for-all-routes`, on all paths. Otherwise vLLM's own check of
`--api-key` applies. Without a file there are no groups.
"""

import asyncio
import base64
import logging
import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import (
    AdminKeyRequired,
    CannotStart,
    InvalidApiKey,
    SaccadeError,
    ScopeMissing,
)
from server.http import key_file
from server.http.errors import respond
from server.http.key_file import BadKeys, KeyTable, Version
from server.http.scope import BatchItem, item_of, path_of, record_of, set_quotas
from server.request import groups
from server.request.limits import Quota
from server.settings import AccessSettings

log = logging.getLogger("saccade.api")

# The group of the keys that are given by `--api-key` in addition to a file.
DEFAULT_GROUP = "default"
_CHECK_INTERVAL_S = 1.0
# Lets a browser ask for the key of a page, as the password of any user.
_TYPED = 'Basic realm="Saccade: the API key is the password"'
# Orchestrators ask without a key whether the server is alive.
_PROBES = frozenset({"/health", "/ready", "/ping"})


class Grant(NamedTuple):
    """What an API key may do.

    Attributes:
        group: the group of the key.
        quotas: the limits of the group and of the key.
        scopes: what the key is restricted to; None: everything that needs no admin key.
    """

    group: str
    quotas: tuple[Quota, ...] = ()
    scopes: frozenset[key_file.Scope] | None = None


class KeyRing:
    """The keys that the server accepts: those of the current file, and those given as flags."""

    def __init__(self, path: Path | None, keys: Sequence[str], admin_key: str | None) -> None:
        """`keys` are those of `--api-key`.

        Raises:
            CannotStart: the file cannot be used, or the admin key is empty.
        """
        if admin_key is not None and not admin_key.strip():
            raise CannotStart("--admin-key is empty")
        admins = frozenset((key_file.digest(admin_key),) if admin_key else ())
        self._path = path
        self._given = KeyTable(admins=admins)
        self._version: Version | None = None
        self._check_at = 0.0
        digests = [key_file.digest(key) for key in keys]
        if path is None:
            open_to = {key: groups.ANONYMOUS for key in digests if key not in admins}
            self._table = KeyTable(open_to, admins=admins)
            return
        in_default = dict.fromkeys(digests, DEFAULT_GROUP)
        try:
            self._given = KeyTable(in_default).joined(self._given)
            self._table, self._version = self._read(path)
        except BadKeys as error:
            raise CannotStart(f"--api-keys-file {path}: {error}") from None
        except OSError as error:
            raise CannotStart(f"--api-keys-file {path}: {error.strerror}") from None

    @property
    def has_groups(self) -> bool:
        """Whether keys are in groups, and are checked here."""
        return self._path is not None

    @property
    def has_keys(self) -> bool:
        return bool(self._table.groups or self._table.admins)

    @property
    def has_admins(self) -> bool:
        return bool(self._table.admins)

    async def grant_of(self, key: str) -> Grant | None:
        """What `key` may do; None if it is unknown."""
        await self._refresh()
        digest, table = key_file.digest(key), self._table
        if digest in table.admins:
            return Grant(groups.ADMIN)
        if (group := table.groups.get(digest)) is None:
            return None
        return Grant(group, table.quotas.get(digest, ()), table.scopes.get(digest))

    async def knows(self, group: str) -> bool:
        """Whether there is a key of `group`. Without groups, all keys are those of ""."""
        await self._refresh()
        if not self.has_groups:
            return not group
        return group == groups.ADMIN or group in self._table.groups.values()

    def quotas_of(self, group: str) -> tuple[Quota, ...]:
        """The limits of `group`, without those of single keys."""
        return self._table.of_groups.get(group, ())

    async def is_admin(self, key: str) -> bool:
        await self._refresh()
        return key_file.digest(key) in self._table.admins

    async def _refresh(self) -> None:
        """Read the file again if it has changed; at most once a second, and never concurrently."""
        if self._path is None or time.monotonic() < self._check_at:
            return
        self._check_at = math.inf
        try:
            await asyncio.to_thread(self._reload, self._path)
        finally:
            self._check_at = time.monotonic() + _CHECK_INTERVAL_S

    def _reload(self, path: Path) -> None:
        version = None
        try:
            version = key_file.version_of(path)
            if version == self._version:
                return
            self._table, version = self._read(path)
            log.info("reloaded the API keys")
        except (BadKeys, OSError) as error:
            if version is not None or self._version is not None:  # otherwise, it is still missing
                why = error.strerror if isinstance(error, OSError) else error
                log.error("failed to reload the API keys from %s: %s; the old keys stay", path, why)
        self._version = version

    def _read(self, path: Path) -> tuple[KeyTable, Version]:
        table, version = key_file.read(path)
        return self._given.joined(table), version


def key_ring(access: AccessSettings, given: Sequence[str], *, keeps_responses: bool) -> KeyRing:
    """The key ring for these settings and the keys `given` by `--api-key`. `keeps_responses`: vLLM
    stores responses, which all groups share.

    Raises:
        CannotStart
    """
    if access.api_keys_file is not None and keeps_responses:
        raise CannotStart(
            "--api-keys-file: all groups would share the responses that "
            "VLLM_ENABLE_RESPONSES_API_STORE keeps"
        )
    ring = KeyRing(access.api_keys_file, given, _admin_key(access))
    if access.keys_for_all_routes and not ring.has_keys:
        raise CannotStart("--keys-for-all-routes needs --api-key, --admin-key or --api-keys-file")
    return ring


def keys_for_vllm(access: AccessSettings, given: Sequence[str]) -> list[str]:
    """The keys that vLLM's own check accepts; none if it is not to check: where `ApiKeys` does."""
    if access.api_keys_file is not None or access.keys_for_all_routes or not given:
        return []
    admin_key = _admin_key(access)
    return [*given, admin_key] if admin_key else [*given]


def _admin_key(access: AccessSettings) -> str | None:
    return access.admin_key.get_secret_value() if access.admin_key is not None else None


class ApiKeys:
    """Checks the keys of requests to guarded paths, and notes the group of the key."""

    def __init__(
        self,
        app: ASGIApp,
        ring: KeyRing,
        guarded: tuple[str, ...],
        priority_header: bytes | None = None,
        reserved: Collection[str] = (),
        files: str = "/v1/files",
    ) -> None:
        """`guarded` are prefixes of paths, below the root path, that need a key for GET and HEAD
        too; "" guards all but probes. Other methods need a key on every path. `priority_header` is
        the header by which the route takes the priority of a request; None if the engine has no
        priorities. `reserved` are paths for admin keys only, and `files` is the path of the Files
        API."""
        self._app = app
        self._ring = ring
        self._guarded = guarded
        self._priority_header = priority_header
        self._reserved = frozenset(reserved)
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if (item := item_of(scope)) is not None:
            await self._pass_item(item, scope, receive, send)
            return
        headers = Headers(scope=scope)
        reads = scope.get("method") in ("GET", "HEAD")
        key = _presented(headers) or (_typed(headers) if reads else None)
        grant = await self._ring.grant_of(key) if key else None
        if grant is None and self._needs_key(scope):
            response = respond(
                InvalidApiKey(
                    "the API key is unknown"
                    if key
                    else "the request has no API key; send it as `Authorization: Bearer KEY`"
                )
            )
            shows_page = reads and "text/html" in headers.get("Accept", "")
            response.headers["WWW-Authenticate"] = f"{_TYPED}, Bearer" if shows_page else "Bearer"
            await response(scope, receive, send)
            return
        if key and (error := self._forbidden(scope, grant)) is not None:
            await respond(error)(scope, receive, send)
            return
        if self._ring.has_groups:
            record_of(scope).key_group = grant.group if grant else groups.ANONYMOUS
        if grant is not None and grant.quotas:
            set_quotas(scope, grant.quotas)
            self._set_priority(scope, grant.quotas)
        await self._app(scope, receive, send)

    async def _pass_item(self, item: BatchItem, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request of a batch pass, whose key was checked when the batch was created."""
        if self._ring.has_groups:
            record_of(scope).key_group = item.group
        set_quotas(scope, self._ring.quotas_of(item.group))
        await self._app(scope, receive, send)

    def _forbidden(self, scope: Scope, grant: Grant | None) -> SaccadeError | None:
        """Why a key may not use the route; None if it may. `grant` is None if it is unknown."""
        path = path_of(scope)
        if path in self._reserved and (grant is None or grant.group != groups.ADMIN):
            return AdminKeyRequired("this route changes the server: it needs an admin key")
        scopes = grant.scopes if grant is not None else None
        if scopes is None or scope.get("method") == "OPTIONS":
            return None
        needed: key_file.Scope = "inference"
        if path == self._files or path.startswith(self._files + "/"):
            needed = "ingest"
        elif scope.get("method") in ("GET", "HEAD"):
            return None
        if needed in scopes:
            return None
        return ScopeMissing(f"this route needs an API key with the scope {needed!r}")

    def _set_priority(self, scope: Scope, quotas: tuple[Quota, ...]) -> None:
        """Give the request the priority of its key, or else of its group, whatever it asks for."""
        name = self._priority_header
        given = [each.limits.priority for each in quotas if each.limits.priority is not None]
        if name is not None and given:
            kept = [header for header in scope["headers"] if header[0] != name]
            scope["headers"] = [*kept, (name, str(given[-1]).encode())]

    def _needs_key(self, scope: Scope) -> bool:
        path = path_of(scope)
        method = scope.get("method")
        if method in ("GET", "HEAD"):  # health, metrics, docs
            return path.startswith(self._guarded) and path not in _PROBES
        return method != "OPTIONS"


async def require_admin(request: Request) -> None:
    """A dependency of routes: only admin keys may pass.

    Raises:
        AdminKeyRequired: the request has none.
    """
    ring: KeyRing = request.app.state.key_ring
    key = _presented(request.headers)
    if key and await ring.is_admin(key):
        return
    if not ring.has_admins:
        raise AdminKeyRequired(
            "this route needs an admin key, and the server has none: start it with --admin-key, "
            'or with "admin" in its --api-keys-file'
        )
    raise AdminKeyRequired("this route needs an admin key")


def _presented(headers: Headers) -> str | None:
    """The bearer key of a request; None if it has none."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" and key else None


def _typed(headers: Headers) -> str | None:
    """The key that a person has typed as a password; None if there is none. A browser sends it with
    every request, also of another site's page, so it is good for reading only."""
    scheme, _, encoded = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        _user, _, key = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return key or None
