"""What code that took over a decoder would try, one attempt after the other.

An attempt counts as prevented if it fails with EPERM, EACCES, EMFILE or ENOSYS. With another error,
the kernel has begun to do it. No attempt does damage where it succeeds.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any

_PREVENTED = (errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENOSYS)
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)
_TIOCSTI, _F_SETOWN = 0x5412, 8
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PTRACE_PEEKDATA = 2
_NO_PROCESS = 0x7FFFFFFF
_CLONE_NEWUSER, _CLONE_FS = 0x10000000, 0x200


def _call(numbers: tuple[int, int], *arguments: int | bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    passed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = libc.syscall(ctypes.c_long(numbers[_COLUMN]), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def _connect(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.connect(address)


def _read_memory(pid: int) -> None:
    into = ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(into), 8)
    _call((310, 270), pid, local, 1, local, 1, 0)


def _limit_at_a_round_address(pid: int) -> None:
    """The address of the new limit has zeros in its lower half, where a filter may look."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # at this address
    place = libc.mmap(0x600000000000, 4096, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    now = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    ctypes.memmove(place, struct.pack("=qq", *now), 16)
    _call((302, 261), pid, resource.RLIMIT_NOFILE, place, None)


def _listening(name: str) -> Callable[[int], None]:
    return lambda server: _connect(socket.AF_UNIX, socket.SOCK_STREAM, name)


def _opening(path: str, flags: int = os.O_RDONLY) -> Callable[[int], object]:
    return lambda server: os.open(path.format(server=server), flags)


def _call_of(x86_64: int, aarch64: int, *arguments: int | None) -> Callable[[int], object]:
    return lambda server: _call((x86_64, aarch64), *arguments)


# Each gets the id of the server's process.
FILES: dict[str, Callable[[int], object]] = {
    "open /etc/passwd": _opening("/etc/passwd"),
    "open its program": _opening(__file__),
    "open its environment": _opening("/proc/self/environ"),
    "open its memory": _opening("/proc/self/mem", os.O_RDWR),
    "open the server's environment": _opening("/proc/{server}/environ"),
    "open the server's command line": _opening("/proc/{server}/cmdline"),
    "open the server's memory": _opening("/proc/{server}/mem", os.O_RDWR),
    "open a file of the server": _opening("/proc/{server}/fd/0"),
    "create a file": _opening("/tmp", os.O_TMPFILE | os.O_WRONLY),
    "write to a directory of fonts": _opening("/usr/share/fonts", os.O_TMPFILE | os.O_WRONLY),
    "list a directory": lambda server: os.listdir("/"),
    "read a link": lambda server: os.readlink("/proc/self/exe"),
    "rename a file": lambda server: os.rename("/tmp/nothing-here", "/tmp/nothing"),
    "delete a file": lambda server: os.unlink("/tmp/nothing-here"),
    "change the directory": lambda server: os.chdir("/"),
}
NETWORK: dict[str, Callable[[int], object]] = {
    "TCP": lambda server: _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 9)),
    "TCP over IPv6": lambda server: _connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 9)),
    "UDP": lambda server: _connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 9)),
    "netlink": lambda server: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "a unix socket": _listening("/tmp/nothing-here"),
    "an abstract unix socket": _listening("\0nothing-here"),
    "a socket pair": lambda server: socket.socketpair(),
    "io_uring": _call_of(425, 425, 0, None),
}
PROCESSES: dict[str, Callable[[int], object]] = {
    "fork": lambda server: os.fork() or os._exit(0),
    "execute": lambda server: os.execv("/nothing-here", ["x"]),
    "signal the server": lambda server: os.kill(server, 0),
    "signal all processes": lambda server: os.kill(-1, 0),
    "a file that signals the server": lambda server: fcntl.fcntl(0, _F_SETOWN, server),
    "tkill": lambda server: _call((200, 130), server, 0),
    "rt_sigqueueinfo": lambda server: _call((129, 138), server, 0, None),
    "pidfd_open": lambda server: _call((434, 434), server, 0),
    "pidfd_getfd": _call_of(438, 438, -1, 0, 0),
    "trace the server": lambda server: _call((101, 117), _PTRACE_PEEKDATA, server, 0, 0),
    "process_vm_readv": _read_memory,
    "process_vm_writev": lambda server: _call((311, 271), server, None, 0, None, 0, 0),
    "the server's limits": _limit_at_a_round_address,
    "the server's cores": lambda server: os.sched_setaffinity(server, os.sched_getaffinity(server)),
    "the server's priority": lambda server: os.setpriority(os.PRIO_PROCESS, server, 0),
    "another's scheduling": lambda server: os.sched_setscheduler(
        _NO_PROCESS, os.SCHED_IDLE, os.sched_param(0)
    ),
    "its own scheduling": lambda server: os.sched_setscheduler(
        0, os.SCHED_OTHER, os.sched_param(0)
    ),
    "kcmp": lambda server: _call((312, 272), os.getpid(), server, 0, 0, 0),
}
KERNEL: dict[str, Callable[[int], object]] = {
    "unshare": _call_of(272, 97, 0),
    "setns": _call_of(308, 268, -1, 0),
    "mount": _call_of(165, 40, None, None, None, 0, None),
    "chroot": lambda server: os.chroot("/nothing-here"),
    "bpf": _call_of(321, 280, -1, None, 0),
    "userfaultfd": _call_of(323, 282, -1),
    "keyctl": _call_of(250, 219, 0, -3, 0),
    "perf_event_open": _call_of(298, 241, None, 0, -1, -1, 0),
    "memfd_secret": _call_of(447, 447, -1),
    "huge pages": lambda server: os.memfd_create("x", os.MFD_HUGETLB),
    "end with the parent no more": _call_of(157, 167, _PR_SET_PDEATHSIG, 0, 0, 0, 0),
    "dumpable": _call_of(157, 167, _PR_SET_DUMPABLE, 1, 0, 0, 0),
    "another filter": _call_of(317, 277, 1, 0, None),
    "its own limits": lambda server: _call(
        (302, 261), 0, resource.RLIMIT_CPU, struct.pack("=qq", -1, -1), None
    ),
    "type into a terminal": lambda server: fcntl.ioctl(2, _TIOCSTI, b"x"),
    # Which the kernel refuses for another reason: both flags exclude each other.
    "a new user namespace": _call_of(56, 220, _CLONE_NEWUSER | _CLONE_FS, 0, 0, 0, 0),
}
ATTEMPTS = FILES | NETWORK | PROCESSES | KERNEL


def not_prevented(server: int) -> list[str]:
    """The names of the attempts that the kernel lets this process make."""
    return [name for name, attempt in ATTEMPTS.items() if not _is_prevented(attempt, server)]


def _is_prevented(attempt: Callable[[int], object], server: int) -> bool:
    try:
        attempt(server)
    except OSError as error:
        return error.errno in _PREVENTED
    return False
