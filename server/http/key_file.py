"""The file of API keys and of their groups.

    {"groups": {"team-a": ["sk-...", "sha256:<hex digest of a key>"]}, "admin": ["sk-..."]}

Keys are kept as SHA-256 only. Messages about an invalid file name its entries by their positions,
since any text in it may be a key.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_KEY = re.compile(r"[!-~]+\Z")  # what a header can carry after `Bearer `
_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}\Z")

# Identifies a version of the file: device, inode, size in bytes, times in ns.
Version = tuple[int, int, int, int, int]


class BadKeys(ValueError):
    """The keys cannot be used; the message says why and contains no key."""


@dataclass(frozen=True)
class KeyTable:
    """Known keys by digest: `groups` is {digest: group}, `admins` are the digests of admin keys."""

    groups: Mapping[bytes, str] = field(default_factory=dict)
    admins: frozenset[bytes] = frozenset()

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
        return KeyTable(groups, admins)


def digest(key: str) -> bytes:
    """The SHA-256 digest of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


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
        raise BadKeys('"groups" must be an object with a list of keys for each group')
    groups: dict[bytes, str] = {}
    for number, (group, keys) in enumerate(listed.items(), 1):
        place = f"group {number}"
        if not _GROUP.match(group):
            raise BadKeys(
                f"the name of {place} must be 1 to 64 letters, digits, '.', '_' and '-', and begin "
                "with a letter or a digit"
            )
        for key, where in _digests(keys, place):
            if groups.setdefault(key, group) != group:
                raise BadKeys(f"{where} is in another group too")
    admins = set()
    for key, where in _digests(document.get("admin", []), "admin"):
        if key in groups:
            raise BadKeys(f"{where} is in a group too")
        admins.add(key)
    if not groups and not admins:
        raise BadKeys("it has no keys")
    return KeyTable(groups, frozenset(admins))


def _digests(keys: Any, place: str) -> Iterator[tuple[bytes, str]]:
    """Yield the digest of each key in a list, and its position."""
    if not isinstance(keys, list):
        raise BadKeys(f"{place} must be a list of keys")
    for number, key in enumerate(keys, 1):
        where = f"key {number} of {place}"
        if not isinstance(key, str) or not _KEY.match(key):
            raise BadKeys(f"{where} must be a string of visible ASCII characters without blanks")
        if not key.startswith(_HASHED):
            yield digest(key), where
        elif _DIGEST.match(hashed := key.removeprefix(_HASHED)):
            yield bytes.fromhex(hashed), where
        else:
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
