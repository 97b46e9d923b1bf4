"""Landlock: the kernel keeps this process from files, TCP and signals to other processes.

Called by number, because glibc has no functions for it. The numbers are the same on all
architectures. The interface: https://docs.kernel.org/userspace-api/landlock.html
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1  # a flag of the first
_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights there are on files, by the version of the interface.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_MOST_FILE_RIGHTS = 16
_TCP = 0b11  # bind, connect; since version 4
_SCOPES = 0b11  # abstract unix sockets, signals; since version 6


def version() -> int:
    """The version of the kernel's interface. Raises OSError if it is missing or switched off."""
    return _call(_CREATE_RULESET, None, 0, _VERSION)


def restrict(readable: Iterable[str], listed: Iterable[str] = ()) -> int:
    """From now on, this thread and those it starts may open nothing but `readable`, files and
    directories with all that is below them, for reading, and the directories `listed`, to list
    them. Returns the version of the kernel's interface.

    Descriptors that are open stay usable. `no_new_privs` must be set.

    Raises:
        OSError: the kernel refuses.
    """
    found = version()
    rights = (1 << _FILE_RIGHTS.get(found, _MOST_FILE_RIGHTS)) - 1
    fields = [rights, *([_TCP] if found >= 4 else []), *([_SCOPES] if found >= 6 else [])]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in listed:
            _allow(rules, path, _READ_DIR)
        _call(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return found


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it does not exist
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _READ_FILE
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: int | bytes | None) -> int:
    passed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
