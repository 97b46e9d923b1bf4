"""API keys: which requests are let in, and the group that a request belongs to.

With a file of keys, the check is made here, on the paths that vLLM guards, before the body of a
request is read. Without one, vLLM's own check of `--api-key` applies, and there are no groups.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import AdminKeyRequired, CannotStart, InvalidApiKey
from server.http import key_file
from server.http.errors import respond
from server.http.key_file import BadKeys, KeyTable, Version
from server.http.scope import record_of
from server.request import groups
from server.settings import AccessSettings

log = logging.getLogger("saccade.api")

# The group of the keys that are given by `--api-key` in addition to a file.
DEFAULT_GROUP = "default"
_CHECK_INTERVAL_S = 1.0


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
        if path is None:
            self._table = self._given
            return
        groups = {key_file.digest(key): DEFAULT_GROUP for key in keys}
        try:
            self._given = KeyTable(groups).joined(self._given)
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
    def has_admins(self) -> bool:
        return bool(self._table.admins)

    async def group_of(self, key: str) -> str | None:
        """The group of `key`; None if it is unknown."""
        await self._refresh()
        digest = key_file.digest(key)
        return groups.ADMIN if digest in self._table.admins else self._table.groups.get(digest)

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
    return KeyRing(access.api_keys_file, given, _admin_key(access))


def keys_for_vllm(access: AccessSettings, given: Sequence[str]) -> list[str]:
    """The keys that vLLM's own check accepts; none if it is not to check."""
    if access.api_keys_file is not None or not given:
        return []
    admin_key = _admin_key(access)
    return [*given, admin_key] if admin_key else [*given]


def _admin_key(access: AccessSettings) -> str | None:
    return access.admin_key.get_secret_value() if access.admin_key is not None else None


class ApiKeys:
    """Checks the keys of requests to guarded paths, and notes the group of the key."""

    def __init__(self, app: ASGIApp, ring: KeyRing, guarded: tuple[str, ...]) -> None:
        """`guarded` are prefixes of paths, below the root path, that need a key for GET and HEAD
        too. Other methods need a key on every path."""
        self._app = app
        self._ring = ring
        self._guarded = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        key = _presented(Headers(scope=scope))
        group = await self._ring.group_of(key) if key else None
        if group is None and self._needs_key(scope):
            response = respond(
                InvalidApiKey(
                    "the API key is unknown"
                    if key
                    else "the request has no API key; send it as `Authorization: Bearer KEY`"
                )
            )
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        record_of(scope).key_group = group or groups.ANONYMOUS
        await self._app(scope, receive, send)

    def _needs_key(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope.get("method")
        if method in ("GET", "HEAD"):  # health, metrics, docs
            return path.startswith(self._guarded)
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
