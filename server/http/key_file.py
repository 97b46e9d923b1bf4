"""The file of API keys, of their groups and of their limits.

    {"groups": {"team-a": ["sk-...", "sha256:<hex digest of a key>"],
                "team-b": {"keys": ["sk-...", {"key": "sk-...", "concurrency": 4}],
                           "requests_per_minute": 600, "share": 2, "scopes": ["inference"]}},
     "admin": ["sk-..."]}

Limits of a group apply to all of its keys together. Keys are kept as SHA-256 only. Messages about
an invalid file name its entries by their positions, since any text in it may be a key.
"""

import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.request.limits import Limits, Quota

_MAX_BYTES = 1 << 20
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_KEY = re.compile(r"[!-~]+\Z")  # what a header can carry after `Bearer `
_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}\Z")

# What keys of a group may do: ask the model, and use the Files API.
Scope = Literal["inference", "ingest"]

# Identifies a version of the file: device, inode, size in bytes, times in ns.
Version = tuple[int, int, int, int, int]


class BadKeys(ValueError):
    """The keys cannot be used; the message says why and contains no key."""


@dataclass(frozen=True)
class KeyTable:
    """Known keys by digest: `groups` is {digest: group}, `quotas` has the limits of those that have
    any, `scopes` what keys may do that may not do everything, and `admins` are the digests of admin
    keys."""

    groups: Mapping[bytes, str] = field(default_factory=dict)
    quotas: Mapping[bytes, tuple[Quota, ...]] = field(default_factory=dict)
    scopes: Mapping[bytes, frozenset[Scope]] = field(default_factory=dict)
    admins: frozenset[bytes] = frozenset()

    @functools.cached_property
    def of_groups(self) -> dict[str, tuple[Quota, ...]]:
        """The limits of each group that has any, without those of its keys."""
        found = {}
        for key, quotas in self.quotas.items():
            name = quota_name(self.groups[key])
            found[self.groups[key]] = tuple(quota for quota in quotas if quota.name == name)
        return found

    def joined(self, other: "KeyTable") -> "KeyTable":
        """Merge both tables.

        Raises:
            BadKeys: a key would be in two groups, or would be both in a group and an admin key.
        """
        groups = {**self.groups, **other.groups}
        admins = self.admins | other.admins
        moved = any(groups[key] != group for key, group in self.groups.items())
        if moved or not admins.isdisjoint(groups):
            raise BadKeys("a key that is also given as a flag is in two groups, or is an admin key")
        quotas = {**self.quotas, **other.quotas}
        return KeyTable(groups, quotas, {**self.scopes, **other.scopes}, admins)


class _OfKey(BaseModel):
    """What a file may say of a key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests_per_minute: int | None = Field(None, ge=1, le=10**9)
    tokens_per_minute: int | None = Field(None, ge=1, le=10**12)
    image_tokens_per_minute: int | None = Field(None, ge=1, le=10**12)
    concurrency: int | None = Field(None, ge=1, le=10**6)
    priority: int | None = Field(None, ge=-(10**6), le=10**6)
    scopes: list[Scope] | None = None


class _OfGroup(_OfKey):
    """What a file may say of a group."""

    share: float = Field(1.0, ge=0.001, le=1000, strict=False, allow_inf_nan=False)


def digest(key: str) -> bytes:
    """The SHA-256 digest of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def quota_name(group: str) -> str:
    """The name of the limits of a group."""
    return f"group:{group}"


def version_of(path: Path) -> Version:
    """The version of the file that is at `path` now. Raises OSError."""
    return _version(os.stat(path))


def read(path: Path) -> tuple[KeyTable, Version]:
    """Read the file at `path`; returns its keys and its version.

    Raises:
        OSError: the file cannot be read.
        BadKeys: its content is invalid.
    """
    # O_NONBLOCK: otherwise, opening a named pipe would wait for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadKeys("it is not a regular file")
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise BadKeys(f"it has more than {_MAX_BYTES} bytes")
    return parse(text), _version(status)


def parse(text: bytes) -> KeyTable:
    """The keys in `text`. Raises BadKeys."""
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except (RecursionError, UnicodeDecodeError):
        raise BadKeys("it is not JSON") from None
    except json.JSONDecodeError as error:
        raise BadKeys(f"it is not JSON: line {error.lineno}, column {error.colno}") from None
    if not isinstance(document, dict) or not document.keys() <= {"groups", "admin"}:
        raise BadKeys('it must be an object with "groups" and "admin", and no other names')
    listed = document.get("groups", {})
    if not isinstance(listed, dict):
        raise BadKeys(
            '"groups" must be an object with a list of keys, or an object, for each group'
        )
    groups: dict[bytes, str] = {}
    quotas: dict[bytes, tuple[Quota, ...]] = {}
    scopes: dict[bytes, frozenset[Scope]] = {}
    for number, (group, content) in enumerate(listed.items(), 1):
        place = f"group {number}"
        if not _GROUP.match(group):
            raise BadKeys(
                f"the name of {place} must be 1 to 64 letters, digits, '.', '_' and '-', and begin "
                "with a letter or a digit"
            )
        of_group = content if isinstance(content, dict) else {"keys": content}
        grants = _grants(of_group, _OfGroup, quota_name(group), place)
        for key, own, where in _keys(of_group.get("keys"), place):
            if groups.setdefault(key, group) != group:
                raise BadKeys(f"{where} is in another group too")
            if grants.quotas or own.quotas:
                quotas[key] = grants.quotas + own.quotas
            allowed = grants.scopes if own.scopes is None else own.scopes
            if allowed is not None:
                scopes[key] = allowed
    admins = set()
    for key, own, where in _keys(document.get("admin", []), "admin"):
        if key in groups:
            raise BadKeys(f"{where} is in a group too")
        if own != _Grants():
            raise BadKeys(f"{where} has limits, and admin keys have none")
        admins.add(key)
    if not groups and not admins:
        raise BadKeys("it has no keys")
    return KeyTable(groups, quotas, scopes, frozenset(admins))


@dataclass(frozen=True)
class _Grants:
    """What a key or a group may do, and how much of it."""

    quotas: tuple[Quota, ...] = ()
    scopes: frozenset[Scope] | None = None


def _grants(entry: dict[str, Any], kind: type[_OfKey], name: str, place: str) -> _Grants:
    """What an object of the file says besides its key or keys."""
    given = {key: value for key, value in entry.items() if key not in ("key", "keys")}
    try:
        found = kind.model_validate(given)
    except ValidationError as error:
        known = {str(each["loc"][0]) for each in error.errors()} & kind.model_fields.keys()
        wrong = ", ".join(sorted(known)) or "unknown names"
        raise BadKeys(f"{place} has invalid limits: {wrong}") from None
    limits = Limits(**found.model_dump(exclude={"scopes"}))
    quotas = () if limits == Limits() else (Quota(name, limits),)
    return _Grants(quotas, None if found.scopes is None else frozenset(found.scopes))


def _keys(keys: Any, place: str) -> Iterator[tuple[bytes, _Grants, str]]:
    """Yield the digest of each key in a list, what it may do, and its position."""
    if not isinstance(keys, list):
        raise BadKeys(f"{place} must have a list of keys")
    for number, given in enumerate(keys, 1):
        where = f"key {number} of {place}"
        entry = given if isinstance(given, dict) else {"key": given}
        found = _digest(entry.get("key"), where)
        yield found, _grants(entry, _OfKey, f"key:{found.hex()}", where), where


def _digest(key: Any, where: str) -> bytes:
    if not isinstance(key, str) or not _KEY.match(key):
        raise BadKeys(f"{where} must be a string of visible ASCII characters without blanks")
    if not key.startswith(_HASHED):
        return digest(key)
    if hashed := _DIGEST.match(key.removeprefix(_HASHED)):
        return bytes.fromhex(hashed[0])
    raise BadKeys(f"{where} must have 64 hexadecimal digits after {_HASHED!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse equal names: `json` would silently keep only the last one, and lose keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadKeys("an object in it has a duplicate name")
    return found


def _version(status: os.stat_result) -> Version:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
