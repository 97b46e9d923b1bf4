"""seccomp: the kernel refuses all system calls of this process but those on a list.

The filter is an allow-list: a call that nobody thought of is refused. It answers with an error
instead of killing the process, because libraries cope with calls that fail: they look for fonts,
count processors, or ask whether a file is a terminal.

Libraries move to newer calls with time. Calls that were added since Linux 5.1 (`_NEW`) fail with
ENOSYS, as on an older kernel, and libraries then fall back to what is on the list. Before that,
glibc's calls for memory, threads and descriptors had hardly changed in ten years.

The filter is installed by number, without libseccomp: a container image need not have that library,
and its Python bindings are no longer maintained.
"""

import ctypes
import errno
import functools
import os
import platform
import struct
from typing import NamedTuple, TypeAlias

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_NAME, _PR_GET_NAME, _PR_SET_NO_NEW_PRIVS = 15, 16, 38
_SET_MODE_FILTER = 1
# All threads of the process at once; no slower memory accesses, which Linux before 5.16 added.
_TSYNC, _SPEC_ALLOW = 1, 4

# Numbers of system calls on x86-64 and AArch64; None if there is no such call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # open descriptors
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "ftruncate": (77, 46),
    "getdents64": (217, 61),
    "newfstatat": (262, 79),  # glibc's fstat; it also finds out whether a file exists
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    # the socket to the server
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "memfd_create": (319, 279),
    # threads
    "clone": (56, 220),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "gettid": (186, 178),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "sched_setscheduler": (144, 119),
    "getcpu": (309, 168),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "prctl": (157, 167),
    # its own signals
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "kill": (62, 129),
    "tgkill": (234, 131),
    # time, and what the process may know of itself
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "prlimit64": (302, 261),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
}
_OPENING = {"open": (2, None), "openat": (257, 56), "stat": (4, None)}
# The first of the calls that have the same number on all architectures.
_NEW = 424
_X32 = 0x40000000  # calls of another interface on x86-64


class _Machine(NamedTuple):
    """`column` is that in `_CALLS`; `audit` is what the kernel calls the architecture."""

    column: int
    audit: int
    seccomp: int


_MACHINES = {
    "x86_64": _Machine(0, 0xC000003E, 317),
    "aarch64": _Machine(1, 0xC00000B7, 277),
}


class _Values(NamedTuple):
    """The argument `number` has one of these values, of at most 32 bits."""

    number: int
    values: tuple[int, ...]


class _Flags(NamedTuple):
    """The argument `number` has no other bits than `allowed`, and the bit `given` if it is not
    0."""

    number: int
    allowed: int
    given: int = 0


_Condition: TypeAlias = _Values | _Flags

_CLONE_THREAD = 0x10000
# VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, DETACHED
_THREAD_FLAGS = 0x7D0F00
_TCGETS, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5421, 0x5450, 0x5451
_MEMFD_FLAGS = 0x1B  # CLOEXEC, ALLOW_SEALING, NOEXEC_SEAL, EXEC; no huge pages
# For reading, with flags that do not matter. The last two are O_LARGEFILE, by architecture.
_READING = (
    os.O_CLOEXEC
    | os.O_DIRECTORY
    | os.O_NOFOLLOW
    | os.O_NONBLOCK
    | os.O_NOCTTY
    | 0o100000
    | 0o400000
)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS.
# F_SETOWN could send signals to other processes.
_FCNTL = (0, 1, 2, 3, 4, 1030, 1033, 1034)


# Stands for the id of the process, which the forkserver does not know.
_ITSELF = 0x7FFFFFFE
# Conditions on the arguments of calls that are otherwise too powerful.
_CONDITIONS: dict[str, list[_Condition]] = {
    "clone": [_Flags(0, _THREAD_FLAGS, _CLONE_THREAD)],
    "kill": [_Values(0, (_ITSELF,))],
    "tgkill": [_Values(0, (_ITSELF,))],
    "prctl": [_Values(0, (_PR_SET_NAME, _PR_GET_NAME))],
    "prlimit64": [_Values(2, (0,))],  # a null pointer: it only asks
    "fcntl": [_Values(1, _FCNTL)],
    "ioctl": [_Values(1, (_TCGETS, _FIONBIO, _FIONCLEX, _FIOCLEX))],
    "memfd_create": [_Flags(1, _MEMFD_FLAGS)],
    "open": [_Flags(1, _READING)],
    "openat": [_Flags(2, _READING)],
    "sched_setscheduler": [_Values(0, (0,)), _Values(1, (os.SCHED_IDLE,))],  # the calling thread
}


# ---------------------------------------------------------------------- the filter

# Instructions of the classic Berkeley Packet Filter: see <linux/bpf_common.h>.
_LOAD, _JUMP, _RETURN = 0x20, 0x05, 0x06
_IF_EQUAL, _IF_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
# Offsets in what the filter gets: the call's number, the architecture, and the arguments.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_INSTRUCTION = struct.Struct("=HBBI")


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; the jumps count the instructions that are left out."""
    return _INSTRUCTION.pack(code, if_true, if_false, value)


def _refuse(error: int) -> bytes:
    return _do(_RETURN, _ERROR | error)


def program(*, opens_files: bool) -> bytes:
    """The filter of this process for this machine. `opens_files`: files may be opened for
    reading, as far as Landlock lets them.

    Raises:
        OSError: the machine's architecture is not supported.
    """
    itself = _do(_IF_EQUAL, os.getpid(), if_true=1)
    return _template(opens_files).replace(_do(_IF_EQUAL, _ITSELF, if_true=1), itself)


@functools.cache
def _template(opens_files: bool) -> bytes:
    """The filter of a process with the id `_ITSELF`."""
    machine = _machine()
    calls = _CALLS | (_OPENING if opens_files else {})
    numbers = {name: calls[name][machine.column] for name in calls}
    free = [each for name, each in numbers.items() if each is not None and name not in _CONDITIONS]
    filter_ = [
        _do(_LOAD, _ARCHITECTURE),
        _do(_IF_EQUAL, machine.audit, if_true=1),
        _refuse(errno.EPERM),
        _do(_LOAD, _NUMBER),
        *(_do(_IF_EQUAL, each, if_true=len(free) - at) for at, each in enumerate(free)),
        _do(_JUMP, 1),
        _do(_RETURN, _ALLOW),
    ]
    for name, conditions in _CONDITIONS.items():
        if (number := numbers.get(name)) is not None:
            checks = [check for each in conditions for check in _checks(each)]
            checks.append(_do(_RETURN, _ALLOW))
            filter_ += [_do(_IF_EQUAL, number, if_false=len(checks)), *checks]
    filter_ += [
        _do(_IF_LEAST, _X32, if_true=1),
        _do(_IF_LEAST, _NEW, if_true=1),
        _refuse(errno.EPERM),
        _refuse(errno.ENOSYS),
    ]
    return b"".join(filter_)


def _checks(condition: _Condition) -> list[bytes]:
    """Instructions that refuse the call or go on behind them. Both machines are little-endian."""
    low = _ARGUMENTS + 8 * condition.number
    checks = [
        _do(_LOAD, low + 4),
        _do(_IF_EQUAL, 0, if_true=1),
        _refuse(errno.EPERM),
        _do(_LOAD, low),
    ]
    if isinstance(condition, _Values):
        count = len(condition.values)
        checks += [
            _do(_IF_EQUAL, value, if_true=count - at) for at, value in enumerate(condition.values)
        ]
    else:
        checks.append(_do(_IF_ANY_BIT, ~condition.allowed & 0xFFFFFFFF, if_true=1))
        checks.append(
            _do(_IF_ANY_BIT, condition.given, if_true=1) if condition.given else _do(_JUMP, 1)
        )
    return [*checks, _refuse(errno.EPERM)]


def _machine() -> _Machine:
    name = platform.machine()
    if name not in _MACHINES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"there is no filter for {name}")
    return _MACHINES[name]


def forbid_new_privileges() -> None:
    """No program that this process could execute gains privileges; needed for the filter and for
    Landlock. Raises OSError."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        _raise()


def install(filter_: bytes) -> None:
    """Apply `filter_` to all threads of this process, for ever.

    Raises:
        OSError: the kernel refuses.
    """
    count = len(filter_) // _INSTRUCTION.size
    instructions = ctypes.create_string_buffer(filter_, len(filter_))
    header = struct.pack("@HP", count, ctypes.addressof(instructions))
    number = ctypes.c_long(_machine().seccomp)
    if _libc.syscall(number, _SET_MODE_FILTER, _TSYNC | _SPEC_ALLOW, header) != 0:
        _raise()


def _raise() -> None:
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))
