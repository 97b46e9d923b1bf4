"""Real disks of a few MiB, which a test can fill: tmpfs in a mount namespace.

The kernel gives it to root, and to others in a user namespace of their own. Where it gives it to
nobody, as in some containers, the tests are skipped.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import starts

MIB = 1 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
_MS_REC, _MS_PRIVATE = 0x4000, 0x4_0000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def small_disk(at: Path, nbytes: int = 4 * MIB) -> Iterator[Path]:
    """A disk of `nbytes`, mounted at the folder `at` by a child process; gives its path as other
    processes reach it."""
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        try:
            ours.close()
            theirs.sendall(_refusal({str(at): nbytes}).encode() or b"ok")
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    try:
        with ours:
            if (reply := ours.recv(1000).decode()) != "ok":
                pytest.skip(f"the kernel mounts no disk for tests: {reply}")
            yield Path(f"/proc/{pid}/root", *at.parts[1:])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def require_disks(at: Path) -> None:
    """Skip the test if `mount` would fail."""
    with small_disk(at):
        pass


def _refusal(disks: Mapping[str, int]) -> str:
    try:
        mount(disks)
    except OSError as error:
        return str(error)
    return ""


def mount(disks: Mapping[str, int]) -> None:
    """Give this process, which has one thread, disks of its own: folder -> bytes.

    Raises:
        OSError: the kernel refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    except PermissionError:
        _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount /")
    for folder, nbytes in disks.items():
        options = f"size={nbytes},mode=0700".encode()
        _check(_libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options), f"mount {folder}")


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


@contextlib.contextmanager
def filled(folder: Path, but: int = 0) -> Iterator[None]:
    """The disk of `folder` is full meanwhile, or has only `but` free bytes."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(64 * 1024))
        if but:
            os.truncate(filler, filler.stat().st_size - but)
        assert shutil.disk_usage(folder).free == but
        yield
    finally:
        filler.unlink()


def saccade(disks: str, *words: str) -> None:
    """`saccade WORDS` with `disks` of its own, in JSON."""
    mount(json.loads(disks))
    starts.saccade(*words)
